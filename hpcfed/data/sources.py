"""Rows from where they are (hub, folder, built-in corpus) into one `TaskData`.

Every fault of the data is found here, before any training, with its place.
"""

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hpcfed.data import corpus, folders, skills, tables
from hpcfed.data.instructions import Instructions
from hpcfed.data.rows import Labelled, Reader, Row, listed, shown
from hpcfed.data.tasks import TASKS, HubSource, Metric
from hpcfed.errors import UserError
from hpcfed.rng import generator
from hpcfed.settings import counts
from hpcfed.settings.config import Columns, Config

_CHUNK = 4096  # rows
_WHOLE = re.compile(r"[+-]?[0-9]{1,4000}")  # no longer text is read as a number


@dataclass(frozen=True)
class Split:
    """The rows of one split, column by column; `labels` (n,) int64 indexes TaskData.kinds. texts:
    of rows with prompts and answers the JSON of an `instructions.Example`."""

    texts: list[str]
    pairs: list[str] | None
    labels: npt.NDArray[np.int64]
    owners: list[str] | None

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class TaskData:
    """labels: in order, by value if all of them are whole numbers, else as texts; none where rows
    are prompts and answers. groups: of such rows, what data.partition.column says."""

    name: str
    labels: tuple[str, ...]
    metric: Metric
    positive: int
    train: Split
    test: Split
    groups: tuple[str, ...] = ()

    @property
    def kinds(self) -> tuple[str, ...]:
        """What Split.labels stand for, and partitions go by."""
        return self.groups or self.labels


def load(config: Config) -> TaskData:
    """The task's rows. Raises UserError for missing, empty or malformed data."""
    check_options(config)
    name, data = config.task.name, config.data
    reader = _reader(config)
    test: list[Row] | None
    if name in counts.BUILT_IN:
        train, test = _built_in(config, reader)
    elif data.root is not None:
        train, test = folders.read(Path(data.root) / name, data, reader)
    elif name in TASKS:
        train, test = tables.from_hub(TASKS[name].hub, data.test is not None, reader)
    elif "/" in name:
        own = HubSource(name, data.subset, data.splits.train, data.splits.test, data.columns)
        train, test = tables.from_hub(own, data.test is not None, reader)
    else:
        raise UserError(
            f"Unknown task {name!r}: name one of {', '.join([*TASKS, *counts.BUILT_IN])}, "
            f"or set data.root to a folder that holds {name}/train.jsonl and {name}/test.jsonl, "
            "or name a hub id, owner/name."
        )
    if not train:
        raise UserError(f"The train split of task {name!r} is empty.")
    if test is None:
        train, test = _hold_out(train, config)
    return _assemble(name, train, test, config)


def check_options(config: Config) -> None:
    """Raises UserError for names of tasks, splits or columns that cannot be."""
    name, data = config.task.name, config.data
    parts = name.split("/")
    if len(parts) > 2 or not all(map(_is_plain, parts)):
        raise UserError(
            f"task.name is {name!r}; it must be a plain name, of a folder in data.root, or a hub "
            "id, owner/name."
        )
    for option, split in (("train", data.splits.train), ("test", data.splits.test)):
        if "/" in split or not _is_plain(split):
            raise UserError(f"data.splits.{option} is {split!r}; it must be a plain name.")
    if data.splits.train == data.splits.test:
        raise UserError(
            f"data.splits.train and data.splits.test are both {data.splits.train!r}; rows to train "
            "on are no test: name another split, or hold rows out with data.test."
        )
    columns = _reader(config).named
    for i, (option, column) in enumerate(columns):
        for other, same in columns[:i]:
            if column == same:
                raise UserError(
                    f"data.columns.{other} and data.columns.{option} are both {column!r}; name a "
                    "column for each."
                )
    by_kind = data.partition.kind in ("dirichlet", "pathological")
    if counts.ANSWERED.holds(config) and by_kind and data.partition.column is None:
        raise UserError(
            f"data.partition.kind={data.partition.kind} goes by the rows' kinds, and prompts have "
            "no labels: name a column in data.partition.column, as topic or source, or use "
            "data.partition.kind=iid, quantity or natural."
        )
    if data.test is not None and name in counts.BUILT_IN:
        raise UserError(f"data.test holds out training rows, but task {name!r} has test rows.")


def _reader(config: Config) -> Reader:
    """How a task's records become rows."""
    columns, partition = config.data.columns, config.data.partition
    owner = partition.column if partition.kind == "natural" else None
    if not counts.ANSWERED.holds(config):
        return Labelled(columns, owner)
    kind = partition.column if partition.kind in ("dirichlet", "pathological") else None
    return Instructions(columns, owner, kind, counts.PREFERRED.holds(config))


def _is_plain(name: str) -> bool:
    return name not in ("", ".", "..") and name.isprintable()


def _built_in(config: Config, reader: Reader) -> tuple[list[Row], list[Row]]:
    """(train, test) of a task that is generated. Raises UserError for an objective that it has no
    rows for."""
    name, head = config.task.name, config.model.head
    if name == skills.NAME:
        if not counts.COMPLETED.holds(config):
            raise UserError(
                f"task {name!r} has prompts with their answers, which model.head={head} does not "
                "take; use model.head=completion, or another task."
            )
        train, test = (
            reader.read([(f"{name}, row {i}", own) for i, own in enumerate(split, 1)])
            for split in skills.generate()
        )
        return train, test
    if counts.ANSWERED.holds(config):
        raise UserError(
            f"model.head={head} needs rows of prompts and answers, which task {name!r} has not; "
            "set task.name and data.root to data of your own, or use another model.head."
        )
    train, test = (
        [Row(text, None, label, None, corpus.NAME) for text, label in split]
        for split in corpus.generate()
    )
    return train, test


def _hold_out(rows: list[Row], config: Config) -> tuple[list[Row], list[Row]]:
    """(train, test): test is a share of the rows, drawn by the seed; no label and no client loses
    its last training row by it."""
    share = config.data.test
    assert share is not None
    left = Counter(kind for row in rows for kind in _kinds(row))
    wanted, held = max(1, int(len(rows) * share)), set[int]()
    for i in generator(config.seed, "held out").permutation(len(rows)).tolist():
        if len(held) < wanted and all(left[kind] > 1 for kind in _kinds(rows[i])):
            left.subtract(_kinds(rows[i]))
            held.add(i)
    if not held:
        raise UserError(
            f"data.test={share:g} can hold out no row of task {config.task.name!r}: each of its "
            f"{len(rows)} rows is the last of its label or client; add a test split."
        )
    return (
        [row for i, row in enumerate(rows) if i not in held],
        [row for i, row in enumerate(rows) if i in held],
    )


def _kinds(row: Row) -> list[tuple[str, str | bool | None]]:
    """What a test row has that training rows must have too."""
    return [("label", row.label), ("owner", row.owner)]


def _assemble(name: str, train: list[Row], test: list[Row], config: Config) -> TaskData:
    if not test:
        raise UserError(f"The test split of task {name!r} is empty.")
    answered = counts.ANSWERED.holds(config)
    if not answered:
        _check_kinds_of_labels(train + test)
        _check_pairs(train, test, config.data.columns)
    if len(train) == len(test) and _contents(train) == _contents(test):
        raise UserError(
            f"The train and test splits of task {name!r} hold the same rows ({train[0].where}; "
            f"{test[0].where}); rows to train on are no test: give other test rows, or hold out "
            "training rows with data.test."
        )
    whole, train = train, _at_most(train, config)
    _check_owners(whole, train, test)
    labels = _in_order({str(row.label) for row in train})
    if len(labels) < 2 and not answered:
        raise UserError(f"Task {name!r}: all training rows have the label {shown(labels[0])}.")
    unseen = next((row for row in test if str(row.label) not in labels), None)
    if unseen is not None:
        what = "kind" if answered else "label"
        raise UserError(
            f"{unseen.where}: test {what} {shown(str(unseen.label))} never occurs in the training "
            f"rows (there: {listed(labels)})."
        )
    if answered:
        splits = _columns(train, labels), _columns(test, labels)
        return TaskData(name, (), "loss", 0, *splits, groups=labels)
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


def _contents(rows: list[Row]) -> Counter[tuple[str, str | None, str | bool]]:
    """What the rows hold, in any order."""
    return Counter((row.text, row.text_pair, row.label) for row in rows)


def _check_kinds_of_labels(rows: list[Row]) -> None:
    """Raises UserError where true and false stand beside 0, 1 or texts: they would be more classes
    than are meant."""
    truth = next((row for row in rows if isinstance(row.label, bool)), None)
    other = next((row for row in rows if not isinstance(row.label, bool)), None)
    if truth is not None and other is not None:
        raise UserError(
            f"{truth.where}: the label is {str(truth.label).lower()}, but {shown(other.label)} at "
            f"{other.where}; write all labels alike, as texts, as numbers, or as true and false."
        )


def _check_pairs(train: list[Row], test: list[Row], columns: Columns) -> None:
    """Raises UserError for a second text that is asked for and not there, or in one split only."""
    first, second = (next((r for r in rows if r.text_pair), None) for rows in (train, test))
    if first is None and columns.text_pair != Columns().text_pair:
        raise UserError(
            f"data.columns.text_pair is {columns.text_pair!r}, but no training row has one "
            f"({train[0].where})."
        )
    if (first is None) != (second is None):
        found, lacking = ("training", "test") if second is None else ("test", "training")
        row = first or second
        assert row is not None
        raise UserError(
            f"{row.where}: this {found} row has a second text, {columns.text_pair!r}, and no "
            f"{lacking} row has one; give it in both splits, or in none."
        )


def _at_most(train: list[Row], config: Config) -> list[Row]:
    """`task.max_train` of the rows, drawn by the seed. Raises UserError if a label is lost."""
    limit = config.task.max_train
    if limit is None or limit >= len(train):
        return train
    order = generator(config.seed, "max_train").permutation(len(train))
    first: dict[str, int] = {}  # where in the order each label comes first
    for place, i in enumerate(order.tolist(), 1):
        first.setdefault(str(train[i].label), place)
    lost = max(first, key=lambda label: first[label])
    if first[lost] > limit:
        raise UserError(
            f"task.max_train={limit} draws no row of the label {shown(lost)}; with this seed "
            f"task.max_train={first[lost]} is the least that draws all {len(first)} labels."
        )
    return [train[i] for i in np.sort(order[:limit])]


def _check_owners(whole: list[Row], train: list[Row], test: list[Row]) -> None:
    """Raises UserError for a test row of a client that has no training row. whole: the training
    rows before task.max_train."""
    known = {row.owner for row in train}
    stranger = next((row for row in test if row.owner not in known | {None}), None)
    if stranger is not None:
        why = (
            "task.max_train draws none of its training rows: raise it"
            if any(row.owner == stranger.owner for row in whole)
            else "no training row is its own: add one, or leave out its test rows"
        )
        raise UserError(f"{stranger.where}: the client {shown(stranger.owner)}: {why}.")


def _in_order(labels: set[str]) -> tuple[str, ...]:
    if all(map(_WHOLE.fullmatch, labels)):
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    return tuple(sorted(labels))


def _columns(rows: list[Row], labels: tuple[str, ...]) -> Split:
    pairs = [row.text_pair or "" for row in rows] if any(row.text_pair for row in rows) else None
    owners = [row.owner or "" for row in rows] if rows[0].owner is not None else None
    index = {label: i for i, label in enumerate(labels)}
    ids = np.array([index[str(row.label)] for row in rows], dtype=np.int64)
    return Split([row.text for row in rows], pairs, ids, owners)


def digest(task: TaskData) -> str:
    """A digest of the rows, in order, and of the labels."""
    found = hashlib.sha256(json.dumps(task.kinds).encode())
    for split in (task.train, task.test):
        found.update(str(len(split)).encode())
        found.update(np.ascontiguousarray(split.labels).tobytes())
        for column in (split.texts, split.pairs, split.owners):
            for start in range(0, len(column or ()), _CHUNK):
                found.update(json.dumps((column or [])[start : start + _CHUNK]).encode())
            found.update(b"\n")
    return found.hexdigest()
