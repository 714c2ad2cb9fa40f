"""Rows: what the records of any source must hold, checked one by one; and those with labels."""

import reprlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hpcfed.errors import UserError
from hpcfed.settings.config import Columns

Record = Mapping[str, Any]
_LISTED = 12  # names in a message
_SHORT = reprlib.Repr()
_SHORT.maxstring = 80


@dataclass(frozen=True)
class Row:
    """One example. label: a text, or true or false, which is no other label's text.
    owner: the client's name. where: its place in the source, for messages."""

    text: str
    text_pair: str | None
    label: str | bool
    owner: str | None
    where: str


class Reader(Protocol):
    """How records become rows."""

    @property
    def columns(self) -> Columns:
        """Which column is which."""

    @property
    def named(self) -> Sequence[tuple[str, str]]:
        """(option in data.columns, column) of what it looks for."""

    def read(self, records: Iterable[tuple[str, Record]], owned: bool = True) -> list[Row]:
        """Rows of a split's (place, record). owned: each row names its client, if a column does;
        else a split may lack it altogether.

        Raises UserError naming the place of the first fault.
        """


@dataclass(frozen=True)
class Labelled:
    """Rows with labels. owner: the column that names the client."""

    columns: Columns
    owner: str | None = None

    @property
    def named(self) -> Sequence[tuple[str, str]]:
        """As of Reader."""
        return [(name, getattr(self.columns, name)) for name in ("text", "text_pair", "label")]

    def read(self, records: Iterable[tuple[str, Record]], owned: bool = True) -> list[Row]:
        """As of Reader."""
        return read(records, self.columns, self.owner, owned)


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
    return [
        _row(where, record, columns, own)
        for where, record, own in with_owner(records, owner, owned)
    ]


def with_owner(
    records: Iterable[tuple[str, Record]], owner: str | None, owned: bool
) -> Iterator[tuple[str, Record, str | None]]:
    """(place, record, column that names its client) of a split; None throughout for one that lacks
    it, which only one that is not `owned` may."""
    lacking = False
    for number, (where, record) in enumerate(records):
        if owner is not None and not owned:
            lacking = owner not in record if number == 0 else lacking
            if lacking and owner in record:
                raise UserError(
                    f"{where}: {owner!r} is here and not in the rows before; give it in all rows "
                    "of the test split, or in none."
                )
        yield where, record, None if lacking else owner


def _row(where: str, record: Record, columns: Columns, owner: str | None) -> Row:
    require(where, record, columns, owner)
    text, pair, label = (record.get(c) for c in (columns.text, columns.text_pair, columns.label))
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: {columns.text!r} must be a non-empty text, not {shown(text)}.")
    if pair is not None and not isinstance(pair, str):
        raise UserError(f"{where}: {columns.text_pair!r} must be a text, not {shown(pair)}.")
    if not isinstance(label, bool):
        label = named(where, columns.label, label)
    name = named(where, owner, record[owner]) if owner is not None else None
    check_encodable(where, columns.text, text)
    check_encodable(where, columns.text_pair, pair or "")
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


def named(where: str, column: str, value: Any) -> str:
    """A label, or a client's name, without the blanks around it."""
    name = str(value).strip() if isinstance(value, (str, int)) else ""
    if not name or isinstance(value, bool):
        raise UserError(f"{where}: {column!r} must be a text or whole number, not {shown(value)}.")
    check_encodable(where, column, name)
    return name


def check_encodable(where: str, column: str, text: str) -> None:
    """Raises UserError for half of a surrogate pair."""
    if text.isascii():  # most are, and it takes no time
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: {column!r} holds half of a character, {text[error.start]!a} without its "
            "other half; write the text anew as UTF-8."
        ) from None


def shown(value: Any) -> str:
    """A value for a message: on one line, and short, however long or deep it is."""
    return _SHORT.repr(value)


def listed(names: Iterable[str]) -> str:
    """Names for a message, the first dozen of them, each as it is if it can be printed."""
    names = list(names)
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    printed = (name if name.isprintable() else ascii(name) for name in names[:_LISTED])
    return ", ".join(name[:80] for name in printed) + more
