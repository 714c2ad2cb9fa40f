"""`hpcfed options`: every option, with its default, what it takes, and what it means."""

import dataclasses
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any

from hpcfed.errors import UserError
from hpcfed.settings.config import Config
from hpcfed.settings.resolve import TYPES, as_text, span

WIDTH = 100


def listing(words: list[str]) -> Iterator[str]:
    """Lines on the options whose dotted names contain one of the words; on all if there is none.

    Raises UserError if a word is in no name.
    """
    options = dict(_options(Config, ""))
    for word in words:
        if not any(word in name for name in options):
            raise UserError(f"No option's name contains {word!r}; `hpcfed options` lists them all.")
    for name, (default, takes, meaning) in options.items():
        if words and not any(word in name for word in words):
            continue
        yield f"{name}={default}"
        yield from textwrap.wrap(
            f"{meaning} [{takes}]", WIDTH, initial_indent="    ", subsequent_indent="    "
        )


def _options(section: Any, prefix: str) -> Iterator[tuple[str, tuple[str, str, str]]]:
    """Dotted name -> default, what it takes, what it means."""
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        name = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _options(hints[field.name], f"{name}.")
        else:
            bounds = span(field.metadata["bounds"])
            takes = _takes(hints[field.name]) + (f", {bounds}" if bounds else "")
            meaning, names = field.metadata["help"], field.metadata["names"]
            if names is not None:
                takes = (
                    f"{takes} of: {', '.join(names)}" if field.default == () else " | ".join(names)
                )
                meaning += ": " + "; ".join(f"{own}: {names.help(own)}" for own in names)
            yield name, (as_text(field.default), takes, meaning)


def _takes(hint: Any) -> str:
    """What a value may be, in words."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_takes(part) for part in typing.get_args(hint))
    if origin is typing.Literal:
        return " | ".join(map(str, typing.get_args(hint)))
    if origin is tuple:
        return "a list of names"
    return TYPES.get(hint, "keys and values")
