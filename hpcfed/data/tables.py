"""Records of Hugging Face `datasets`: from the hub, saved by `save_to_disk`, or a parquet file.

Integers that stand for named classes (`ClassLabel`) become their names. The library is imported
when one of these forms is read: it takes a second.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hpcfed.data import rows
from hpcfed.data.rows import Reader, Record, Row
from hpcfed.data.tasks import HubSource
from hpcfed.errors import UserError
from hpcfed.settings.config import Columns


def records(
    dataset: Any,
    place: str,
    columns: Columns,
    owner: str | None = None,
    rename: Mapping[Any, str] | None = None,
) -> Iterator[tuple[str, Record]]:
    """(place, record) of a `datasets.Dataset`; only the columns that are asked for.

    rename: label there -> label here. Raises UserError for a column that is missing, or a class
    without a name.
    """
    rows.require(place, dataset.column_names, columns, None)
    wanted = (columns.text, columns.text_pair, columns.label, owner)
    chosen = dataset.select_columns([name for name in dataset.column_names if name in wanted])
    names = getattr(dataset.features[columns.label], "names", None)
    for index, record in enumerate(chosen):
        where, label = f"{place}, row {index}", record[columns.label]
        if names is not None and isinstance(label, int):
            if not 0 <= label < len(names):
                raise UserError(
                    f"{where}: {columns.label!r} is {label}, which stands for no class (the hub "
                    "hides the labels of some test splits so); name a split with labels in "
                    "data.splits.test, or hold one out with data.test."
                )
            label = names[label]
        if rename and isinstance(label, (str, int)):
            label = rename.get(label, label)
        yield where, {**record, columns.label: label}


def of(
    reader: Reader, dataset: Any, place: str, rename: Mapping[Any, str] | None = None
) -> Iterator[tuple[str, Record]]:
    """(place, record) of a `datasets.Dataset` for a reader."""
    if isinstance(reader, rows.Labelled):
        return records(dataset, place, reader.columns, reader.owner, rename)
    return ((f"{place}, row {index}", record) for index, record in enumerate(dataset))


def parquet(path: Path) -> Any:
    """A parquet file as a `datasets.Dataset`. Raises UserError if it cannot be read."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        twice = {
            name for name in file.schema_arrow.names if file.schema_arrow.names.count(name) > 1
        }
        if twice:
            raise UserError(
                f"{path}: two columns are called {rows.shown(min(twice))}; name each once."
            )
        table = file.read()
        plain = [  # pandas' categories
            field.with_type(field.type.value_type)
            if pyarrow.types.is_dictionary(field.type)
            else field
            for field in table.schema
        ]
        return datasets.Dataset(table.cast(pyarrow.schema(plain, table.schema.metadata)))
    except (OSError, ValueError, TypeError, NotImplementedError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read as parquet ({told(error)}).") from None


def saved(folder: Path) -> Any:
    """A `datasets.Dataset` that `save_to_disk` wrote. Raises UserError if it cannot be read."""
    import datasets

    try:
        return datasets.load_from_disk(str(folder))
    except Exception as error:  # damaged JSON, missing keys and files, Arrow's own
        raise UserError(
            f"{folder} cannot be read as a data set of save_to_disk ({told(error)})."
        ) from None


def from_hub(source: HubSource, held_out: bool, reader: Any) -> tuple[list[Row], list[Row] | None]:
    """Train and test rows of a hub data set. held_out: test rows will be taken from the training
    rows, and are None here. reader: a dataclass of rows.Reader.

    Raises UserError where the hub cannot be reached, or has no such split.
    """
    import datasets

    try:
        loaded: Mapping[str, Any] = datasets.load_dataset(source.path, source.config)
    except Exception as error:  # the library raises a dozen unrelated types for "not reachable"
        raise UserError(
            f"Could not load {source.path} from the Hugging Face hub ({told(error)}); "
            "set data.root to a folder with the data."
        ) from None
    for split in (source.train, source.test):
        if split not in loaded and not (held_out and split == source.test):
            raise UserError(
                f"{source.path} has no split {split!r} (it has {rows.listed(loaded)}); name others "
                "in data.splits, or hold test rows out with data.test."
            )
    if held_out and source.test in loaded:
        raise UserError(
            f"data.test holds out training rows, but {source.path} has a split {source.test!r}; "
            "leave out data.test, or name another data.splits.test."
        )

    own = replace(reader, columns=source.columns)

    def read(split: str, owned: bool) -> list[Row]:
        place = f"{source.path}, {split}"
        found: list[Row] = own.read(of(own, loaded[split], place, source.rename), owned)
        return found

    return read(source.train, True), None if held_out else read(source.test, False)


def told(error: Exception) -> str:
    """An error's type, and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__
