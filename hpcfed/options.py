"""`hpcfed options`: every option, with its default, what it takes, and what it means."""

import dataclasses
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any

from hpcfed.config import Config
from hpcfed.errors import UserError

WIDTH = 100
_TYPES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def listing(words: list[str]) -> Iterator[str]:
    """Lines on the options whose dotted names contain one of the words; on all if there is none.

    Raises UserError if a word is in no name.
    """
    found = dict(_options(Config, ""))
    for word in words:
        if not any(word in name for name in found):
            raise UserError(f"No option's name contains {word!r}; `hpcfed options` lists them all.")
    for name, spec in found.items():
        if words and not any(word in name for word in words):
            continue
        bounds = " and ".join(f"{k.replace('_', ' ')} {v:g}" for k, v in spec["bounds"].items())
        takes = f"{spec['takes']}, {bounds}" if bounds else spec["takes"]
        yield f"{name}={spec['default']}"
        yield from textwrap.wrap(
            f"{spec['help']} [{takes}]", WIDTH, initial_indent="    ", subsequent_indent="    "
        )


def _options(section: Any, prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
    hints = typing.get_type_hints(section)
    for own in dataclasses.fields(section):
        name = f"{prefix}{own.name}"
        if dataclasses.is_dataclass(hints[own.name]):
            yield from _options(hints[own.name], f"{name}.")
        else:
            yield (
                name,
                {
                    "default": _shown(own.default),
                    "takes": _takes(hints[own.name]),
                    "help": own.metadata.get("help", ""),
                    "bounds": own.metadata.get("bounds", {}),
                },
            )


def _shown(value: Any) -> str:
    """As it would be written on the command line."""
    if isinstance(value, tuple):
        return f"[{','.join(map(str, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _takes(hint: Any) -> str:
    """What a value may be, in words."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_takes(part) for part in typing.get_args(hint))
    if origin is typing.Literal:
        return " | ".join(map(str, typing.get_args(hint)))
    if origin is tuple:
        return "a list of names"
    if hint is type(None):
        return "null"
    return _TYPES.get(hint, "keys and values")
