"""Own data in a folder: which file is a split, and its rows.

A split is `<split>.jsonl`, `.csv` or `.parquet`, or a folder that `datasets.save_to_disk` wrote; a
data set saved without splits is the training split.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from hpcfed.data import files, tables
from hpcfed.data.rows import Reader, Record, Row, listed
from hpcfed.errors import UserError
from hpcfed.settings.config import Data

_SUFFIXES = (".jsonl", ".csv", ".parquet")
_SAVED = "state.json"  # in each data set that save_to_disk wrote


def read(folder: Path, data: Data, reader: Reader) -> tuple[list[Row], list[Row] | None]:
    """Train and test rows; None where the test rows are to be held out.

    Raises UserError for what is not there, or there twice, and for the first malformed row.
    """
    try:
        whole = [folder] if (folder / _SAVED).is_file() else []
        train = _only([*_found(folder, data.splits.train), *whole])
        test = _only(_found(folder, data.splits.test))
        holds = _nearest(folder)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be read ({error.strerror}); check its permissions, data.root and "
            "task.name."
        ) from None
    if train is None:
        raise UserError(
            f"No data: {folder / data.splits.train}.jsonl (or .csv, .parquet, or a folder of "
            f"save_to_disk) does not exist ({holds}); check data.root and task.name."
        )
    if test is None and data.test is None:
        raise UserError(
            f"No test rows: {folder / data.splits.test}.jsonl (or .csv, .parquet, or a folder of "
            f"save_to_disk) does not exist ({holds}); add it, or hold out training rows with "
            "data.test, a share."
        )
    if test is not None and data.test is not None:
        raise UserError(
            f"data.test={data.test:g} holds out training rows for the test, but there is {test}; "
            "leave out data.test, or name another data.splits.test."
        )
    return (
        reader.read(_records(train, reader)),
        reader.read(_records(test, reader), owned=False) if test else None,
    )


def _found(folder: Path, split: str) -> list[Path]:
    """Raises UserError for one that is no file: a folder, a link to nothing, a pipe."""
    paths = [folder / f"{split}{suffix}" for suffix in _SUFFIXES]
    saved = [folder / split] if (folder / split / _SAVED).is_file() else []
    odd = next((path for path in paths if os.path.lexists(path) and not path.is_file()), None)
    if odd is not None:
        raise UserError(f"{odd} is no file, nor a link to one; put the rows there, or remove it.")
    return [path for path in paths if path.is_file()] + saved


def _only(found: list[Path]) -> Path | None:
    """Raises UserError if a split is there in two forms."""
    if len(found) > 1:
        raise UserError(
            f"{found[0]} and {found[1]} are both there; keep the one that is to be used."
        )
    return found[0] if found else None


def _nearest(folder: Path) -> str:
    """What is in the folder, or in the first above it that exists."""
    here = next((path for path in (folder, *folder.parents) if path.is_dir()), Path())
    return f"{here} holds {listed(sorted(path.name for path in here.iterdir())) or 'nothing'}"


def _records(path: Path, reader: Reader) -> Iterator[tuple[str, Record]]:
    if path.suffix in (".jsonl", ".csv"):
        return files.records(path)
    dataset = tables.parquet(path) if path.suffix == ".parquet" else tables.saved(path)
    return tables.of(reader, dataset, str(path))
