"""Rows from where they are (hub, folder of JSONL or CSV, built-in corpus) into one `TaskData`.

Every fault of the data is found here, before any training, with file and line.
"""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpcfed.data import corpus
from hpcfed.data.tasks import TASKS, HubSource, Metric
from hpcfed.errors import UserError
from hpcfed.rng import generator
from hpcfed.settings.config import Columns, Config


@dataclass(frozen=True)
class Row:
    """One labelled example; `where` is its place in the source, for messages."""

    text: str
    text_pair: str | None
    label: str
    owner: str | None
    where: str


@dataclass(frozen=True)
class Split:
    """The rows of one split, column by column; `labels` (n,) int64 indexes TaskData.labels."""

    texts: list[str]
    pairs: list[str] | None
    labels: npt.NDArray[np.int64]
    owners: list[str] | None

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class TaskData:
    name: str
    labels: tuple[str, ...]
    metric: Metric
    positive: int
    train: Split
    test: Split


def load(config: Config) -> TaskData:
    """The task's rows. Raises UserError for missing, empty or malformed data."""
    name, root = config.task.name, config.data.root
    owner = config.data.partition.column if config.data.partition.kind == "natural" else None
    if name == corpus.NAME:
        train, test = (_corpus_rows(split) for split in corpus.generate())
    elif root is not None:
        train, test = (
            list(read_file(_find(Path(root) / name, split), config.data.columns, owner))
            for split in ("train", "test")
        )
    elif name in TASKS:
        train, test = from_hub(TASKS[name].hub, owner)
    else:
        raise UserError(
            f"Unknown task {name!r}: name one of {', '.join([*TASKS, corpus.NAME])}, "
            f"or set data.root to a folder that holds {name}/train.jsonl and {name}/test.jsonl."
        )
    return _assemble(name, train, test, config)


def _corpus_rows(split: Iterable[tuple[str, str]]) -> list[Row]:
    return [Row(text, None, label, None, corpus.NAME) for text, label in split]


def _find(folder: Path, split: str) -> Path:
    for suffix in (".jsonl", ".csv"):
        path = folder / f"{split}{suffix}"
        if path.is_file():
            return path
    raise UserError(
        f"No data: {folder / split}.jsonl (or .csv) does not exist; check data.root and task.name."
    )


def read_file(path: Path, columns: Columns, owner: str | None = None) -> Iterator[Row]:
    """Rows of a .jsonl or .csv file. Raises UserError naming file and line of the first fault."""
    with path.open(encoding="utf-8", newline="") as stream:
        records = _jsonl(stream, path) if path.suffix == ".jsonl" else _csv(stream, path)
        try:
            for number, record in records:
                yield _row(record, columns, owner, f"{path}, line {number}")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text ({error.reason}).") from None


def _jsonl(stream: Iterable[str], path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not valid JSON ({error.msg}).") from None
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number}: each line must be a JSON object.")
        yield number, record


def _csv(stream: Iterable[str], path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(stream, strict=True)
    try:
        for record in reader:
            if None in record or None in record.values():
                raise UserError(
                    f"{path}, line {reader.line_num}: "
                    f"expected {len(reader.fieldnames or ())} columns as in the header."
                )
            yield reader.line_num, record
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: malformed CSV ({error}).") from None


def _row(record: Mapping[str, Any], columns: Columns, owner: str | None, where: str) -> Row:
    for column in (columns.text, columns.label, *([owner] if owner else [])):
        if column not in record:
            raise UserError(
                f"{where}: no {column!r} (there are: {', '.join(map(str, record))}); "
                "data.columns says which column is which."
            )
    text, pair, label = (record.get(c) for c in (columns.text, columns.text_pair, columns.label))
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: {columns.text!r} must be a non-empty text, not {text!r}.")
    if pair is not None and not isinstance(pair, str):
        raise UserError(f"{where}: {columns.text_pair!r} must be a text, not {pair!r}.")
    if not isinstance(label, (str, int)) or label == "":
        raise UserError(
            f"{where}: {columns.label!r} must be a text or whole number, not {label!r}."
        )
    return Row(text, pair, str(label), str(record[owner]) if owner else None, where)


def from_hub(source: HubSource, owner: str | None = None) -> tuple[list[Row], list[Row]]:
    """Train and test rows of a hub data set. Raises UserError where the hub cannot be reached."""
    import datasets

    try:
        loaded = datasets.load_dataset(source.path, source.config)
    except Exception as error:  # the library raises a dozen unrelated types for "not reachable"
        raise UserError(
            f"Could not load {source.path} from the Hugging Face hub ({type(error).__name__}: "
            f"{str(error).splitlines()[0][:120]}); set data.root to a folder with the data."
        ) from None
    return (
        rows_from_hub(loaded[source.train], source, owner),
        rows_from_hub(loaded[source.test], source, owner),
    )


def rows_from_hub(dataset: Any, source: HubSource, owner: str | None = None) -> list[Row]:
    """Rows of one `datasets.Dataset`: columns and labels mapped to ours."""
    label_feature = dataset.features[source.label]
    rows = []
    for index, record in enumerate(dataset):
        label = record[source.label]
        if (
            isinstance(label, int)
            and not isinstance(label, bool)
            and hasattr(label_feature, "names")
        ):
            label = label_feature.int2str(label)
        columns = {
            "text": record[source.text],
            "label": source.rename.get(label, label),
            **({"text_pair": record[source.text_pair]} if source.text_pair else {}),
            **({owner: record[owner]} if owner and owner in record else {}),
        }
        rows.append(_row(columns, Columns(), owner, f"{source.path}, row {index}"))
    return rows


def _assemble(name: str, train: list[Row], test: list[Row], config: Config) -> TaskData:
    for split, rows in (("train", train), ("test", test)):
        if not rows:
            raise UserError(f"The {split} split of task {name!r} is empty.")
    limit = config.task.max_train
    if limit is not None and limit < len(train):
        chosen = generator(config.seed, "max_train").permutation(len(train))[:limit]
        train = [train[i] for i in np.sort(chosen)]
    labels = tuple(sorted({row.label for row in train}))
    if len(labels) < 2:
        raise UserError(f"Task {name!r}: all training rows have the label {labels[0]!r}.")
    unseen = next((row for row in test if row.label not in labels), None)
    if unseen is not None:
        raise UserError(
            f"{unseen.where}: test label {unseen.label!r} never occurs in the training rows "
            f"(there: {', '.join(labels)})."
        )
    spec = TASKS.get(name)
    positive = spec.positive if spec and spec.positive in labels else labels[-1]
    metric: Metric = spec.metric if spec and len(labels) == 2 else "accuracy"
    return TaskData(
        name,
        labels,
        metric,
        labels.index(positive or labels[-1]),
        _columns(train, labels),
        _columns(test, labels),
    )


def _columns(rows: list[Row], labels: tuple[str, ...]) -> Split:
    pairs = [row.text_pair or "" for row in rows] if any(row.text_pair for row in rows) else None
    owners = [row.owner or "" for row in rows] if rows[0].owner is not None else None
    index = {label: i for i, label in enumerate(labels)}
    ids = np.array([index[row.label] for row in rows], dtype=np.int64)
    return Split([row.text for row in rows], pairs, ids, owners)
