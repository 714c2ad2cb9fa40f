"""Records of JSONL and CSV files, each with its line.

UTF-8, with a byte order mark or without; fields of any length. Every fault of a file is found here,
with file and line.
"""

import csv
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hpcfed.data.rows import Record, shown
from hpcfed.errors import UserError


def records(path: Path, columns: int = 2) -> Iterator[tuple[str, Record]]:
    """(place, record) of a .jsonl or .csv file, which has at least so many columns. Raises
    UserError for a file that cannot be read, is not UTF-8, or is malformed."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            jsonl = path.suffix == ".jsonl"
            lines = _jsonl(stream, path) if jsonl else _csv(stream, path, columns)
            for number, record in lines:
                yield f"{path}, line {number}", record
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}, line {_undecodable(path)}: not UTF-8 text ({error.reason}); save it in that "
            "encoding."
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from None


def _undecodable(path: Path) -> int:
    """The first line that is not UTF-8."""
    with path.open("rb") as stream:
        lines = enumerate(stream, 1)
        return next(n for n, line in lines if line.decode(errors="ignore").encode() != line)


class _TwiceError(ValueError):
    """A key that stands twice in a JSON object."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise _TwiceError(shown(_repeated(key for key, _ in pairs)))
    return record


def _repeated(names: Iterable[str]) -> str | None:
    """The first name that stands twice."""
    return next((name for name, times in Counter(names).items() if times > 1), None)


def _jsonl(stream: Iterable[str], path: Path) -> Iterator[tuple[int, Record]]:
    decoder = json.JSONDecoder(object_pairs_hook=_once)
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = decoder.decode(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{where}: not valid JSON ({error.msg}); each line must be one JSON object."
            ) from None
        except _TwiceError as error:
            raise UserError(f"{where}: the key {error} stands twice; name each once.") from None
        except RecursionError:
            raise UserError(f"{where}: JSON that is nested too deeply to be read.") from None
        except ValueError:  # Python's limit for text -> int
            raise UserError(
                f"{where}: a number of more than {sys.get_int_max_str_digits()} digits; write it "
                "in quotes."
            ) from None
        if not isinstance(record, dict):
            raise UserError(f"{where}: each line must be a JSON object.")
        yield number, record


def _csv(stream: Iterable[str], path: Path, columns: int) -> Iterator[tuple[int, Record]]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(stream, strict=True)
    header: list[str] | None = None
    while True:
        number = reader.line_num + 1  # where a record begins; it may have several lines
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise UserError(
                f"{path}, line {number}: malformed CSV ({error}); a double quote inside a text "
                "must be doubled, and the whole text quoted."
            ) from None
        if fields is None:
            return
        if not fields:
            continue
        if header is None:
            header = _header(fields, f"{path}, line {number}", columns)
        elif len(fields) != len(header):
            raise UserError(
                f"{path}, line {number}: expected {len(header)} columns as in the header, not "
                f"{len(fields)}; a text that holds a comma must stand in double quotes."
            )
        else:
            yield number, dict(zip(header, fields, strict=True))


def _header(fields: list[str], where: str, columns: int) -> list[str]:
    names = [name.strip() for name in fields]
    twice = _repeated(name for name in names if name)  # Excel leaves columns without a name
    if twice is not None:
        raise UserError(f"{where}: two columns are called {shown(twice)}; name each once.")
    if len(names) < columns:
        raise UserError(
            f"{where}: the header has one column, {shown(names[0])}; it must name the columns, and "
            "commas must stand between them."
        )
    return names
