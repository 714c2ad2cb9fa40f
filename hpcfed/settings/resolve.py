"""From preset names, YAML files and `a.b=c` overrides to one checked `Config`.

Later sources win: defaults < presets < YAML file < command line. Everything is strict: an unknown
key names its nearest legal one, a wrong type says what is wanted, a value out of range the range.
"""

import contextlib
import dataclasses
import difflib
import operator
import types
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from hpcfed.errors import UserError
from hpcfed.settings import plugins
from hpcfed.settings.config import Config

DEFAULT = "default"
_BOUNDS = {
    "at_least": operator.ge,
    "at_most": operator.le,
    "above": operator.gt,
    "below": operator.lt,
}
COMMAND_LINE = "command line"


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A checked configuration and, for each dotted key, the name of the source that set it."""

    config: Config
    origin: dict[str, str]


# What a value of a type is called.
TYPES = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    type(None): "null",
}


def presets() -> dict[str, str]:
    """Preset name -> its one-line description."""
    folder = resources.files("hpcfed.settings") / "presets"
    descriptions = {}
    for entry in sorted(folder.iterdir(), key=lambda e: e.name.removesuffix(".yaml")):
        if entry.name.endswith(".yaml"):
            content = yaml.safe_load(entry.read_text())
            descriptions[entry.name.removesuffix(".yaml")] = content.get("description", "")
    return descriptions


def resolve(source: str, overrides: Sequence[str] = ()) -> Resolved:
    """Resolve `source` (a preset's name or a YAML file) with `key=value` overrides.

    Raises UserError for anything unknown, ill-typed or out of range.
    """
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    parsed = [_parse_override(text) for text in overrides]
    layers = [(tree, COMMAND_LINE) for tree in parsed]
    method = next((tree["method"] for tree in reversed(parsed) if "method" in tree), None)

    if source in presets():
        preset = _read_preset(source)
        if method is not None and "method" in preset:  # another method in a preset's setting
            layers.insert(0, ({**preset, "method": method}, f"preset {source}"))
        method = method or source
    else:
        path = Path(source)
        if not path.is_file():
            raise UserError(
                f"{source!r} is neither a YAML file nor a preset;{_nearest(source, presets())} "
                f"presets: {', '.join(presets())}."
            )
        tree = _read_beside(path)
        if "base" in tree and method is None:  # it is a preset of the user's own
            method = source
        else:
            tree.pop("base", None)
            method = method or tree.get("method", "lora-fedavg")
            layers.insert(0, (tree, source))

    for tree, name in [*_preset_chain(method), *layers]:
        _merge(values, tree, name, origin)
    values["method"] = _final_method(method)
    named = source in presets() or method == source
    origin.setdefault("method", f"preset {method}" if named else DEFAULT)
    files = _listed(values.get("plugins"))
    plugins.load([file for file in files if isinstance(file, str)])  # they register names
    return Resolved(_build(Config, values, "", origin), origin)


def _preset_chain(method: Any, above: tuple[str, ...] = ()) -> list[tuple[dict[str, Any], str]]:
    """The preset and the ones it builds on, the most basic first. above: those that build on it."""
    known = presets()
    if not isinstance(method, str) or not (method in known or _is_file(method)):
        raise UserError(
            f"Unknown preset {method!r} for method;{_nearest(str(method), known)} "
            f"presets: {', '.join(known)}; or a YAML file of your own."
        )
    places = [Path(name).resolve() if _is_file(name) else name for name in (*above, method)]
    if places[-1] in places[:-1]:
        raise UserError(f"The preset {method} builds on itself; see its `base`.")
    tree = _read_preset(method)
    # A setting (demo) names the `method` that it runs; a method may name another as its `base`.
    base = tree.pop("method", None) or tree.pop("base", None)
    chain = _preset_chain(base, (*above, method)) if base else []
    return [*chain, (tree, f"preset {method}")]


def _is_file(name: str) -> bool:
    """Whether it is a preset of the user's own."""
    return name.endswith((".yaml", ".yml")) and Path(name).is_file()


def _read_beside(path: Path) -> dict[str, Any]:
    """A configuration file; the files that it names lie beside it, or where the process runs."""
    tree = read_file(path)
    tree.pop("description", None)

    def located(name: Any) -> Any:
        beside = path.parent / name if isinstance(name, str) else path
        return str(beside) if isinstance(name, str) and beside.is_file() else name

    for key in ("base", "method"):
        if isinstance(tree.get(key), str) and tree[key] not in presets():
            tree[key] = located(tree[key])
    if tree.get("plugins") is not None:
        tree["plugins"] = [located(name) for name in _listed(tree["plugins"])]
    return tree


def _listed(value: Any) -> list[Any]:
    """A list of names, for which a single one may stand."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _read_preset(name: str) -> dict[str, Any]:
    if _is_file(name):
        return _read_beside(Path(name))
    text = (resources.files("hpcfed.settings") / "presets" / f"{name}.yaml").read_text()
    tree = _read_yaml(text, f"preset {name}")
    tree.pop("description", None)
    return tree


def _final_method(method: str) -> str:
    """A preset that builds on a method runs that method: `demo` runs fibecfed."""
    tree = _read_preset(method)
    return _final_method(tree["method"]) if "method" in tree else method


def read_file(path: Path) -> dict[str, Any]:
    """The keys and values in a YAML file. Raises UserError if it holds anything else."""
    try:
        return _read_yaml(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 (byte {error.start}); save it in that encoding."
        ) from None


def _read_yaml(text: str, name: str) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise UserError(
            f"{name}{line}: not valid YAML ({getattr(error, 'problem', error)})."
        ) from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{name}: the top level must be keys and values, not {_kind(tree)}.")
    return tree


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"Override {text!r} must look like section.key=value.")
    try:
        tree: Any = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"Override {text!r}: the value is not valid YAML.") from None
    for part in reversed(key.strip().split(".")):
        tree = {part: tree}
    return typing.cast(dict[str, Any], tree)


def _merge(
    into: dict[str, Any], tree: dict[str, Any], name: str, origin: dict[str, str], prefix: str = ""
) -> None:
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict) and isinstance(into.get(key, {}), dict):
            _merge(into.setdefault(key, {}), value, name, origin, f"{dotted}.")
        else:
            into[key] = value
            origin[dotted] = name


def _build(cls: Any, tree: dict[str, Any], prefix: str, origin: dict[str, str]) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in fields:
            where = f"{prefix}{key}"
            source = _source(origin, where, "configuration")
            raise UserError(
                f"Unknown key {where!r} ({source});{_nearest(str(key), fields, prefix)} "
                f"legal here: {', '.join(fields)}."
            )
    built = {}
    for name, spec in fields.items():
        dotted = f"{prefix}{name}"
        if dataclasses.is_dataclass(hints[name]):
            sub = tree.get(name, {})
            if not isinstance(sub, dict):
                raise UserError(
                    f"{dotted} ({origin.get(dotted)}) must be a section of keys and values, "
                    f"not {_kind(sub)}."
                )
            built[name] = _build(hints[name], sub, f"{dotted}.", origin)
        elif name in tree:
            label = f"{dotted} ({_source(origin, dotted)})"
            none = spec.default == () and tree[name] == []
            value = () if none else _check(tree[name], hints[name], spec.metadata["bounds"], label)
            if spec.metadata["names"] is not None:
                _choose(value, spec.metadata["names"], label)
            built[name] = value
        else:
            built[name] = spec.default
            origin[dotted] = DEFAULT
    return cls(**built)


def _source(origin: dict[str, str], dotted: str, otherwise: str = DEFAULT) -> str:
    """What set a key, or, where its value is itself keys and values, something inside it."""
    inside = (source for key, source in origin.items() if key.startswith(f"{dotted}."))
    return origin.get(dotted) or next(inside, otherwise)


def _check(value: Any, hint: Any, bounds: dict[str, float], label: str) -> Any:
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
        _choose(value, typing.get_args(kind), label)
        return value
    if typing.get_origin(kind) is Mapping:
        if not isinstance(value, dict) or not all(
            isinstance(word, str) for pair in value.items() for word in pair
        ):
            raise UserError(
                f"{label} must give a text for each text, not {value!r}; mind that YAML reads 0 "
                "and 1 as numbers, yes and no as true and false, unless they stand in quotes."
            )
        return dict(value)
    if typing.get_origin(kind) is tuple:
        items = value if isinstance(value, list) else [value]
        if not items or not all(isinstance(item, str) for item in items):
            raise UserError(f"{label} must be a list of names, not {value!r}.")
        return tuple(items)
    return _check_scalar(value, kind, kinds, bounds, label)


def _choose(value: Any, choices: Collection[Any], label: str) -> None:
    for name in value if isinstance(value, tuple) else (value,):
        if name not in choices:
            raise UserError(
                f"{label} is {name!r};{_nearest(str(name), choices)} "
                f"choose one of: {', '.join(map(str, choices))}."
            )


def _check_scalar(
    value: Any, kind: Any, kinds: tuple[Any, ...], bounds: dict[str, float], label: str
) -> Any:
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 4e-3, with no dot, as a text
        with contextlib.suppress(ValueError):
            value = float(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{label} must be {_wanted(kinds)}, not {value!r}.")
    for name, holds in _BOUNDS.items():
        if name in bounds and not holds(value, bounds[name]):
            raise UserError(f"{label} is {value!r}, out of range: it must be {span(bounds)}.")
    return value


def span(bounds: dict[str, float]) -> str:
    """An option's range in words; empty if it has none."""
    return " and ".join(f"{name.replace('_', ' ')} {bound:g}" for name, bound in bounds.items())


def _wanted(kinds: tuple[Any, ...]) -> str:
    return " or ".join(
        TYPES.get(kind) or " or ".join(map(repr, typing.get_args(kind))) for kind in kinds
    )


def _kind(value: Any) -> str:
    return {list: "a list", str: "a text", int: "a number", float: "a number"}.get(
        type(value), repr(value)
    )


def _nearest(word: str, legal: Any, prefix: str = "") -> str:
    match = difflib.get_close_matches(word, [str(item) for item in legal], n=1, cutoff=0.5)
    return f" did you mean {prefix + match[0]!r}?" if match else ""


def changed(config: Config, text: str) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (value in `text`, value now), where a configuration differs from one that
    `describe` wrote."""
    tree = yaml.safe_load(text)
    then = dict(leaves(tree if isinstance(tree, dict) else {}))
    now = dict(leaves(config.to_dict()))
    return {
        key: (then.get(key), now.get(key))
        for key in {**now, **then}
        if key not in then or key not in now or then[key] != now[key]
    }


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of each value of a nested configuration; tuples as lists."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def describe(resolved: Resolved) -> str:
    """The resolved configuration as YAML, each line with the source of its value."""
    lines = list(_lines(resolved.config.to_dict(), resolved.origin, "", 0))
    width = min(64, max(len(text) for text, _ in lines))
    return "\n".join(f"{text:<{width}}  # {source}" if source else text for text, source in lines)


# Options whose value is itself keys and values.
_MAPPINGS = ("task.verbalizer",)


def as_text(value: Any) -> str:
    """A value as it is written in a configuration or after section.key=, on one line."""
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=10**6).strip()
    return text.removesuffix("...").strip()


def _lines(
    tree: dict[str, Any], origin: dict[str, str], prefix: str, depth: int
) -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, dict) and f"{prefix}{key}" not in _MAPPINGS:
            yield f"{'  ' * depth}{key}:", ""
            yield from _lines(value, origin, f"{prefix}{key}.", depth + 1)
        else:
            yield f"{'  ' * depth}{key}: {as_text(value)}", _source(origin, f"{prefix}{key}")
