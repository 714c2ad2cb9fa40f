"""Labelled examples: what the records of any source must hold, checked one by one."""

import reprlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hpcfed.errors import UserError
from hpcfed.settings.config import Columns

Record = Mapping[str, Any]
_LISTED = 12  # names in a message


@dataclass(frozen=True)
class Row:
    """One labelled example. label: a text, or true or false, which is no other label's text.
    owner: the client's name. where: its place in the source, for messages."""

    text: str
    text_pair: str | None
    label: str | bool
    owner: str | None
    where: str


def read(
    records: Iterable[tuple[str, Record]],
    columns: Columns,
    owner: str | None = None,
    owned: bool = True,
) -> list[Row]:
    """Rows of a split's (place, record). owner: the column that names the client; if not `owned`,
    a split may lack it altogether.

    Raises UserError naming the place of the first fault.
    """
    rows: list[Row] = []
    lacking = False
    for where, record in records:
        if owner is not None and not owned:
            lacking = owner not in record if not rows else lacking
            if lacking and owner in record:
                raise UserError(
                    f"{where}: {owner!r} is here and not in the rows before; give it in all rows "
                    "of the test split, or in none."
                )
        rows.append(_row(where, record, columns, None if lacking else owner))
    return rows


def _row(where: str, record: Record, columns: Columns, owner: str | None) -> Row:
    require(where, record, columns, owner)
    text, pair, label = (record.get(c) for c in (columns.text, columns.text_pair, columns.label))
    if not isinstance(text, str) or not text.strip():
        raise UserError(
            f"{where}: {columns.text!r} must be a non-empty text, not {reprlib.repr(text)}."
        )
    if pair is not None and not isinstance(pair, str):
        raise UserError(f"{where}: {columns.text_pair!r} must be a text, not {reprlib.repr(pair)}.")
    if not isinstance(label, bool):
        label = _name(where, columns.label, label)
    name = _name(where, owner, record[owner]) if owner is not None else None
    for column, value in ((columns.text, text), (columns.text_pair, pair)):
        _check_encodable(where, column, value or "")
    return Row(text, pair, label, name, where)


def require(where: str, names: Collection[str], columns: Columns, owner: str | None) -> None:
    """Raises UserError unless the needed columns are among the names."""
    for column in (columns.text, columns.label):
        if column not in names:
            raise UserError(
                f"{where}: no {column!r} (there are: {listed(map(repr, names))}); "
                "data.columns says which column is which."
            )
    if owner is not None and owner not in names:
        raise UserError(
            f"{where}: no {owner!r} (there are: {listed(map(repr, names))}); "
            "data.partition.column says which column names the client."
        )


def _name(where: str, column: str, value: Any) -> str:
    """A label, or a client's name, without the blanks around it."""
    name = str(value).strip() if isinstance(value, (str, int)) else ""
    if not name or isinstance(value, bool):
        raise UserError(
            f"{where}: {column!r} must be a text or whole number, not {reprlib.repr(value)}."
        )
    _check_encodable(where, column, name)
    return name


def _check_encodable(where: str, column: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: {column!r} holds half of a character, {text[error.start]!a} without its "
            "other half; write the text anew as UTF-8."
        ) from None


def listed(names: Iterable[str]) -> str:
    """Names for a message, the first dozen of them."""
    names = list(names)
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(name[:80] for name in names[:_LISTED]) + more
