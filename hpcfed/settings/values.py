"""Whether a value is of an option's type, and in its range; and what is said if it is not."""

import contextlib
import difflib
import math
import operator
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any

from hpcfed.errors import UserError
from hpcfed.settings.reading import shown

# What a value of a type is called.
TYPES = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    type(None): "null",
}
_BOUNDS = {
    "at_least": operator.ge,
    "at_most": operator.le,
    "above": operator.gt,
    "below": operator.lt,
}
# What arrays, files and 32-bit floats hold, where an option has no bound of its own.
MOST_WHOLE, MOST_REAL = 2**31 - 1, 1e38
MOST_BYTES, MOST_BYTES_OF_A_NAME = 4095, 255  # of a path, and between its separators


def check(value: Any, hint: Any, meta: Mapping[str, Any], label: str) -> Any:
    """The value as the option's type has it. meta: of `config.option`. label: the option, and where
    the value is from.

    Raises UserError for a wrong type, a value out of range, and an unknown name.
    """
    checked = _check(value, hint, meta["bounds"], label)
    if meta["names"] is not None:
        choose(checked, meta["names"], label)
    for text in checked if isinstance(checked, tuple) else (checked,):
        if isinstance(text, str):
            _check_text(text, meta["path"], label)
    return checked


def _check(value: Any, hint: Any, bounds: Mapping[str, float], label: str) -> Any:
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    kinds = typing.get_args(hint) if union else (hint,)
    if value is None:
        if type(None) in kinds:
            return None
        raise UserError(f"{label} must be {_wanted(kinds)}, not null.")
    words = [w for k in kinds if typing.get_origin(k) is typing.Literal for w in typing.get_args(k)]
    if len(kinds) > 1 and value in words:  # a number, or a word that stands for one
        return value
    kind = next(k for k in kinds if k is not type(None))
    if typing.get_origin(kind) is typing.Literal:
        choose(value, typing.get_args(kind), label)
        return value
    if typing.get_origin(kind) is Mapping:
        if not isinstance(value, dict) or not all(
            isinstance(word, str) for pair in value.items() for word in pair
        ):
            raise UserError(
                f"{label} must give a text for each text, not {shown(value)}; mind that YAML reads "
                "0 and 1 as numbers, yes and no as true and false, unless they stand in quotes."
            )
        for pair in value.items():
            for word in pair:
                _check_text(word, False, label)
        return dict(value)
    if typing.get_origin(kind) is tuple:
        items = value if isinstance(value, list) else [value]
        if not items or not all(isinstance(item, str) for item in items):
            raise UserError(f"{label} must be a list of names, not {shown(value)}.")
        return tuple(items)
    return _check_scalar(value, kind, kinds, bounds, label)


def choose(value: Any, choices: Collection[Any], label: str) -> None:
    """Raises UserError unless it is, or all of a tuple are, among the choices."""
    for name in value if isinstance(value, tuple) else (value,):
        if not isinstance(name, str) or name not in choices:
            raise UserError(
                f"{label} is {shown(name)};{nearest(str(name), choices)} "
                f"choose one of: {', '.join(map(str, choices))}."
            )


def _check_scalar(
    value: Any, kind: Any, kinds: tuple[Any, ...], bounds: Mapping[str, float], label: str
) -> Any:
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 4e-3, with no dot, as a text
        with contextlib.suppress(ValueError):
            value = float(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{label} must be {_wanted(kinds)}, not {shown(value)}.")
    for name, holds in _BOUNDS.items():
        if name in bounds and not holds(value, bounds[name]):
            raise UserError(f"{label} is {value!r}, out of range: it must be {span(bounds)}.")
    most = {int: MOST_WHOLE, float: MOST_REAL}.get(kind)
    if most is not None and "at_most" not in bounds and not -most <= value <= most:
        finite = "finite, and " if not math.isfinite(value) else ""
        raise UserError(f"{label} is {value!r}; it must be {finite}at most {_number(most)}.")
    return value


def _check_text(text: str, path: bool, label: str) -> None:
    """Raises UserError for a text that no file, or no file's name, can hold."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise UserError(f"{label} holds half a character ({shown(text)}); write it anew.") from None
    if "\0" in text:
        raise UserError(f"{label} holds a NUL character ({shown(text)}); leave it out.")
    if not path:
        return
    longest = max(len(part.encode()) for part in text.split("/"))
    if size > MOST_BYTES or longest > MOST_BYTES_OF_A_NAME:
        raise UserError(
            f"{label} is longer than a file system takes, {MOST_BYTES_OF_A_NAME} bytes for a name "
            f"and {MOST_BYTES} for a path ({shown(text)})."
        )


def span(bounds: Mapping[str, float]) -> str:
    """An option's range in words; empty if it has none."""
    return " and ".join(
        f"{name.replace('_', ' ')} {_number(bound)}" for name, bound in bounds.items()
    )


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _wanted(kinds: tuple[Any, ...]) -> str:
    return " or ".join(
        TYPES.get(kind) or " or ".join(map(repr, typing.get_args(kind))) for kind in kinds
    )


def nearest(word: str, legal: Collection[Any], prefix: str = "") -> str:
    """A question that proposes the nearest legal word; empty if none is near."""
    match = difflib.get_close_matches(word[:100], [str(item) for item in legal], n=1, cutoff=0.5)
    return f" did you mean {prefix + match[0]!r}?" if match else ""
