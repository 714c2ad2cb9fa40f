"""`hpcfed options`: every option, with its default, what it takes, and what it means."""

import difflib
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any

from hpcfed.errors import UserError
from hpcfed.settings.resolve import as_text, options, presets, resolve, type_of
from hpcfed.settings.values import TYPES, span

WIDTH = 100


def listing(words: list[str]) -> Iterator[str]:
    """Lines on the options that have one of the words in their names; for a word that is in none,
    on those that have it in what is said of them, or that a preset of that name sets. On all if
    there is no word.

    Raises UserError if a word is found nowhere.
    """
    told = {name: _told(name, spec) for name, spec in options()}
    found = dict.fromkeys(told, "") if not words else _found(told, words)
    for name, by in found.items():
        default, text = told[name]
        yield f"{name}={default}{by}"
        yield from textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent="    ")


def _found(told: dict[str, tuple[str, str]], words: list[str]) -> dict[str, str]:
    """The options that the words find, in the order of all; and, behind those that a preset sets,
    to what it does."""
    found: dict[str, str] = {}
    for word in words:
        hits = {name: "" for name in told if word in name}
        if not hits:
            hits = {name: "" for name, (_, text) in told.items() if word.lower() in text.lower()}
        hits |= _set_by(word) if word in presets() else {}
        if not hits:
            near = difflib.get_close_matches(word, [*told, *presets()], n=1, cutoff=0.5)
            raise UserError(
                f"No option has {word!r} in its name or explanation;"
                + (f" did you mean {near[0]!r}?" if near else "")
                + " `hpcfed options` lists them all."
            )
        found |= hits
    return {name: found[name] for name in told if name in found}


def _set_by(preset: str) -> dict[str, str]:
    """The options that a preset sets, and to what."""
    resolved = resolve(preset)
    return {
        name: f"   ({preset}: {as_text(value)})"
        for name, value in _values(resolved.config)
        if name != "method" and resolved.origin[name].startswith("preset ")
    }


def _values(config: Any) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of each option."""
    for name, _ in options():
        value = config
        for part in name.split("."):
            value = getattr(value, part)
        yield name, value


def _told(name: str, spec: Any) -> tuple[str, str]:
    """An option's default, and what it means and takes."""
    bounds = span(spec.metadata["bounds"])
    takes = _takes(type_of(name)) + (f", {bounds}" if bounds else "")
    meaning, names = spec.metadata["help"], spec.metadata["names"]
    if names is not None:
        takes = f"{takes} of: {', '.join(names)}" if spec.default == () else " | ".join(names)
        meaning += ": " + "; ".join(f"{own}: {names.help(own)}" for own in names)
    when = spec.metadata["counts"]
    return as_text(spec.default), f"{meaning} [{takes}]" + (
        f" Counts if {when.words}." if when else ""
    )


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
