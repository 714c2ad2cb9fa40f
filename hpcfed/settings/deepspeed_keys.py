"""The keys, types and ranges of DeepSpeed's configuration classes, read from the source of the
installed DeepSpeed: to import it takes seconds, and a wrong key should be refused within one.

What only the classes themselves know (how keys go together) they say when they are made, see
`deepspeed_config.verify`.
"""

import ast
import functools
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcfed.errors import UserError
from hpcfed.settings.reading import shown
from hpcfed.settings.values import nearest

_TYPES = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "a text",
          "list": "a list", "List": "a list"}  # fmt: skip
_RANGES = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


@dataclass(frozen=True)
class Key:
    """A field of a class. kinds: names of builtin types; none, if it takes what is not checked
    here. section: the fields of the class that it holds. choices: of an enumeration."""

    kinds: tuple[str, ...] = ()
    bounds: dict[str, float] = field(default_factory=dict)
    section: "dict[str, Key] | None" = None
    choices: tuple[Any, ...] = ()
    optional: bool = False
    newer: str = ""  # the key that has replaced it
    stage3: bool = False


@functools.cache
def known(file: str, name: str) -> dict[str, Key]:
    """Key -> what it takes, of a class in a file of the installed DeepSpeed; by its alias too.

    Raises UserError without a DeepSpeed.
    """
    module, path = _parsed(file)
    (found,) = (n for n in module.body if isinstance(n, ast.ClassDef) and n.name == name)
    keys = {}
    for node in found.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            options = _options(node.value)
            alias = options.get("alias", node.target.id)
            key = _key(node.annotation, module, path, options, alias.startswith("stage3_"))
            keys[alias] = keys[node.target.id] = key
    return keys


@functools.cache
def _parsed(file: str) -> tuple[ast.Module, Path]:
    spec = importlib.util.find_spec("deepspeed")
    if spec is None or spec.origin is None:
        raise UserError("DeepSpeed is not installed; `pip install hpcfed` brings it.")
    path = Path(spec.origin).parent / file
    return ast.parse(path.read_text()), path


def _options(value: ast.expr | None) -> dict[str, Any]:
    """What `Field(...)` is told: alias, range, and what has replaced the field."""
    options: dict[str, Any] = {}
    for given in value.keywords if isinstance(value, ast.Call) else ():
        if isinstance(given.value, ast.Constant):
            options[str(given.arg)] = given.value.value
        elif given.arg == "json_schema_extra" and isinstance(given.value, ast.Dict):
            for name, own in zip(given.value.keys, given.value.values, strict=True):
                if isinstance(name, ast.Constant) and isinstance(own, ast.Constant):
                    options[str(name.value)] = own.value
    return options


def _key(
    annotation: ast.expr, module: ast.Module, path: Path, options: dict[str, Any], stage3: bool
) -> Key:
    names = {n.id for n in ast.walk(annotation) if isinstance(n, ast.Name)}
    bounds = {name: options[name] for name in _RANGES if name in options}
    newer = options.get("new_param", "") if options.get("deprecated") else ""
    kinds = tuple(name for name in _TYPES if name in names)
    if "List" in kinds:  # of what, the class says
        kinds = ("list",)
    own = [name for name in names if name not in _TYPES and name[0].isupper()]
    own = [name for name in own if name not in ("Optional", "Union", "Path", "Dict", "Any")]
    section, choices = None, ()
    if len(own) == 1:
        section, choices = _class(own[0], module, path)
    if "Path" in names:
        kinds = ("str",)
    return Key(kinds, bounds, section, choices, "Optional" in names, newer, stage3)


def _class(
    name: str, module: ast.Module, path: Path
) -> tuple[dict[str, Key] | None, tuple[Any, ...]]:
    """The fields of a class that is written or imported in a module, or an enumeration's values."""
    for node in module.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            values = tuple(
                n.value.value
                for n in node.body
                if isinstance(n, ast.Assign) and isinstance(n.value, ast.Constant)
            )
            if any(isinstance(base, ast.Name) and base.id == "Enum" for base in node.bases):
                return None, tuple(dict.fromkeys(values))
            return known(_relative(path), name), ()
        if isinstance(node, ast.ImportFrom) and name in (alias.name for alias in node.names):
            folder = path.parent if node.level else _root(path)
            parts = (node.module or "").split(".")
            there = folder.joinpath(*(parts if node.level else parts[1:])).with_suffix(".py")
            other, place = _parsed(_relative(there))
            return _class(name, other, place)
    return None, ()


def _root(path: Path) -> Path:
    return next(p for p in path.parents if p.name == "deepspeed")


def _relative(path: Path) -> str:
    return str(path.relative_to(_root(path)))


def check(where: str, given: Any, keys: dict[str, Key], stage: int) -> None:
    """Raises UserError for a section that its class would not take, or that has no effect at this
    ZeRO stage. where: the file, and the section's name in it."""
    if not isinstance(given, dict):
        raise UserError(f"{where} must be an object of keys and values, not {shown(given)}.")
    for name, value in given.items():
        if name not in keys:
            legal = ", ".join(sorted(keys))
            raise UserError(
                f"{where}: DeepSpeed has no key {shown(name)} here;{nearest(name, keys)} "
                f"legal here: {legal}."
            )
        _check_value(f"{where}.{name}", value, keys[name], stage)


def _check_value(where: str, value: Any, key: Key, stage: int) -> None:
    if key.newer:
        raise UserError(f"{where} is a name of the past; use {key.newer}.")
    if key.stage3 and stage != 3:
        raise UserError(f"{where} has no effect at ZeRO stage {stage}, but at 3; remove it.")
    if value is None and key.optional:
        return
    if value == "auto" and "str" not in key.kinds:
        raise UserError(
            f"{where} is 'auto', which only Hugging Face's Trainer fills in; give a value, or "
            "leave it out for DeepSpeed's own."
        )
    if key.section is not None:
        check(where, value, key.section, stage)
    elif key.choices:
        same = [own for own in key.choices if own == value]
        if not same or isinstance(value, bool) != isinstance(same[0], bool):
            choices = ", ".join(map(str, key.choices))
            raise UserError(f"{where} is {shown(value)}; choose one of: {choices}.")
    elif key.kinds and not any(_is(value, kind) for kind in key.kinds):
        wanted = " or ".join(_TYPES[kind] for kind in key.kinds)
        raise UserError(f"{where} must be {wanted}, not {shown(value)}.")
    for name, bound in key.bounds.items():
        holds = {"ge": value >= bound, "gt": value > bound, "le": value <= bound,
                 "lt": value < bound}  # fmt: skip
        if not holds[name]:
            raise UserError(f"{where} is {value!r}; it must be {_RANGES[name]} {bound:g}.")


def _is(value: Any, kind: str) -> bool:
    """As JSON has it: 5e8 is a whole number."""
    if isinstance(value, bool):
        return kind == "bool"
    if kind == "int":
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return isinstance(value, {"float": (int, float), "str": str, "list": list}.get(kind, ()))
