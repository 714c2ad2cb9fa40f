"""What is read back is checked before it is believed: types, ranges, digests."""

import hashlib
import json
import os
import sys
import types
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from hpcfed.settings.values import TYPES
from hpcfed.storage.paths import FILES, FOLDERS


class DamageError(Exception):
    """A file that is not as it was written. what: reads on after the file's name."""

    def __init__(self, file: Path, what: str) -> None:
        super().__init__(f"{file} {what}")
        self.file, self.what = file, what


def digest(content: bytes) -> str:
    """SHA-256, in hex."""
    return hashlib.sha256(content).hexdigest()


def read_bytes(file: Path) -> bytes:
    """A file's content. Raises DamageError if it cannot be read."""
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise DamageError(file, "is missing") from None
    except OSError as error:
        raise DamageError(file, f"cannot be read ({error.strerror})") from None


def as_object(content: bytes) -> dict[str, Any]:
    """The JSON object in a file's content. Raises ValueError if it is anything else."""
    try:
        tree = json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError:  # UnicodeDecodeError too
        raise ValueError("it is not JSON") from None
    if not isinstance(tree, dict):
        raise ValueError("it is no JSON object")
    return tree


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises DamageError if it is anything else."""
    try:
        return as_object(read_bytes(file))
    except ValueError as error:
        raise DamageError(file, f"is damaged ({error})") from None


def check_kinds(run: Path, writable: bool = True) -> None:
    """Raises DamageError where in a run directory a folder stands for a file, or a file for a
    folder, or one must not be read or, if it is to be `writable`, written."""
    access = os.R_OK | os.W_OK * writable
    for name in ("", *FILES, *FOLDERS):
        path = run / name
        folder = name not in FILES
        if path.exists() and folder != path.is_dir():
            kinds = ("a file", "a folder")
            raise DamageError(path, f"is {kinds[not folder]}, where {kinds[folder]} should be")
        if path.exists() and not os.access(path, access | os.X_OK * folder):
            needed = "readable and writable" if writable else "readable"
            raise DamageError(path, f"must be {needed}, and is not")


def parse(kind: Any, value: Any, name: str = "") -> Any:
    """A value from JSON as its annotation says it: dataclasses with all their fields and no other,
    whole numbers from 0 on, finite numbers, texts, lists and dictionaries of them.

    Raises ValueError, which says what is wrong with `name`.
    """
    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{name or 'it'} is {_short(value)}, not keys and values")
        prefix = f"{name}." if name else ""
        hints = typing.get_type_hints(kind)
        known = [spec.name for spec in fields(kind)]
        odd = next((key for key in known if key not in value), None)
        if odd is not None:
            raise ValueError(f"{prefix}{odd} is missing")
        odd = next((key for key in value if key not in known), None)
        if odd is not None:
            raise ValueError(f"{prefix}{odd[:40]} does not belong there")
        own = {key: parse(hints[key], value[key], f"{prefix}{key}") for key in known}
        return typing.cast(Any, kind)(**own)
    arguments = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return None if value is None else parse(arguments[0], value, name)
    if typing.get_origin(kind) is tuple and isinstance(value, list):
        return tuple(parse(arguments[0], item, name) for item in value)
    if typing.get_origin(kind) is dict and isinstance(value, dict):
        return {key: parse(arguments[1], item, f"{name}.{key[:40]}") for key, item in value.items()}
    if kind is int and type(value) is int and 0 <= value < 2**63:
        return value
    if kind is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:
        return float(value)
    if kind is str and isinstance(value, str):
        return value
    wanted = {int: "a whole number, at least 0", float: "a finite number"}.get(kind)
    wanted = wanted or TYPES.get(kind) or ("a list" if arguments[1:] == (...,) else "a mapping")
    raise ValueError(f"{name} is {_short(value)}, not {wanted}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
