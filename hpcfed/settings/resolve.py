"""From preset names, YAML files and `a.b=c` overrides to one checked `Config`.

Later sources win: defaults < presets < YAML file < command line. Everything is strict: an unknown
key names its nearest legal one, a wrong type says what is wanted, a value out of range the range.
"""

import copy
import dataclasses
import difflib
import functools
import math
import os
import typing
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from hpcfed.errors import UserError
from hpcfed.settings import plugins, reading, values
from hpcfed.settings.config import Config
from hpcfed.settings.counts import When
from hpcfed.settings.reading import kind, shown
from hpcfed.settings.values import nearest

DEFAULT = "default"
COMMAND_LINE = "command line"


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A checked configuration and, for each dotted key, the name of the source that set it.

    changed: the keys whose values the user has given, on the command line or in a file that is no
    preset, and that would be others without.
    """

    config: Config
    origin: dict[str, str]
    changed: frozenset[str] = frozenset()


@functools.cache
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
    tree: dict[str, Any] = {}
    origin: dict[str, str] = {}
    parsed = [reading.override(text) for text in overrides]
    layers = [(own, COMMAND_LINE) for own in parsed]
    methods = [own["method"] for own in parsed if "method" in own]

    if source in presets():
        preset = _read_preset(source)
        if methods and "method" in preset:  # another method in a preset's setting
            layers.insert(0, ({**preset, "method": methods[-1]}, f"preset {source}"))
        method = methods[-1] if methods else source
    else:
        if not os.path.isfile(source):
            raise UserError(
                f"{shown(source)} is neither a YAML file nor a preset;"
                f"{nearest(source, presets())} presets: {', '.join(presets())}."
            )
        own = _read_beside(Path(source))
        if "base" in own and not methods:  # it is a preset of the user's own
            method = source
        else:
            own.pop("base", None)
            method = methods[-1] if methods else own.get("method", "lora-fedavg")
            layers.insert(0, (own, source))

    for own, name in _preset_chain(method):
        _merge(tree, own, name, origin)
    unchanged = copy.deepcopy(tree)
    for own, name in layers:
        _merge(tree, own, name, origin)
    tree["method"] = _final_method(method)
    named = source in presets() or method == source
    origin.setdefault("method", f"preset {method}" if named else DEFAULT)
    (spec,) = (f for f in dataclasses.fields(Config) if f.name == "plugins")
    plugins.load(_leaf(spec, Config, tree, "", origin))  # they register names
    config = _build(Config, tree, "", origin)
    return Resolved(config, origin, _changed_by_user(config, origin, unchanged))


def stored(file: Path) -> Config:
    """The configuration that `describe` wrote into a file. Raises UserError if it holds none."""
    tree = reading.read_file(file)
    plugins.load(tuple(_listed(tree.get("plugins"))))
    config: Config = _build(Config, tree, "", dict.fromkeys(tree, str(file)))
    return config


def _changed_by_user(
    config: Config, origin: dict[str, str], unchanged: dict[str, Any]
) -> frozenset[str]:
    """The keys that the user has given, with other values than the presets' tree has."""
    try:
        before = dict(leaves(_build(Config, unchanged, "", {}).to_dict()))
    except UserError:  # a preset of the user's own, which was mended from outside
        before = {}
    return frozenset(
        key
        for key, value in leaves(config.to_dict())
        if origin.get(key, DEFAULT) != DEFAULT
        and not origin[key].startswith("preset ")
        and (key not in before or before[key] != value)
    )


def _preset_chain(method: Any, above: tuple[str, ...] = ()) -> list[tuple[dict[str, Any], str]]:
    """The preset and the ones it builds on, the most basic first. above: those that build on it."""
    known = presets()
    if not isinstance(method, str) or not (method in known or _is_file(method)):
        if method is None:
            raise UserError("method is null; name a preset, or leave it out.")
        raise UserError(
            f"Unknown preset {shown(method)} for method;{nearest(str(method), known)} "
            f"presets: {', '.join(known)}; or a YAML file of your own."
        )
    places = [Path(name).resolve() if _is_file(name) else name for name in (*above, method)]
    if places[-1] in places[:-1]:
        raise UserError(f"The preset {method} builds on itself; see its `base`.")
    tree = _read_preset(method)
    # A setting (demo) names the `method` that it runs; a method may name another as its `base`.
    named = next((key for key in ("method", "base") if key in tree), None)
    chain = _preset_chain(tree.pop(named), (*above, method)) if named else []
    return [*chain, (tree, f"preset {method}")]


def _is_file(name: str) -> bool:
    """Whether it is a preset of the user's own."""
    return name.endswith((".yaml", ".yml")) and os.path.isfile(name)


def _read_beside(path: Path) -> dict[str, Any]:
    """A configuration file; the files that it names lie beside it, or where the process runs."""
    tree = reading.read_file(path)
    tree.pop("description", None)

    def located(name: Any) -> Any:
        beside = path.parent / name if isinstance(name, str) else path
        return str(beside) if isinstance(name, str) and os.path.isfile(beside) else name

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
    tree = reading.read_text(text, f"preset {name}")
    tree.pop("description", None)
    return tree


def _final_method(method: str) -> str:
    """A preset that builds on a method runs that method: `demo` runs fibecfed."""
    tree = _read_preset(method)
    return _final_method(tree["method"]) if "method" in tree else method


@functools.cache
def _types(section: Any) -> dict[str, Any]:
    """Key -> type, of a section."""
    return typing.get_type_hints(section)


def _merge(
    into: dict[str, Any],
    tree: dict[str, Any],
    name: str,
    origin: dict[str, str],
    section: Any = Config,
    prefix: str = "",
) -> None:
    """Put a tree over another. Raises UserError for a value where a section has to be, which a
    later tree would otherwise drop."""
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        below = _types(section).get(key)
        if dataclasses.is_dataclass(below):
            if not isinstance(value, dict):
                raise UserError(
                    f"{dotted} ({name}) must be a section of keys and values, not {kind(value)}."
                )
            _merge(into.setdefault(key, {}), value, name, origin, below, f"{dotted}.")
        elif isinstance(value, dict) and value and isinstance(into.get(key), dict):
            into[key] = {**into[key], **value}
            origin[dotted] = name
        else:
            into[key] = value
            origin[dotted] = name


def _build(cls: Any, tree: dict[str, Any], prefix: str, origin: dict[str, str]) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = _types(cls)
    for key in tree:
        if key not in fields:
            raise UserError(_unknown(key, prefix, list(fields), origin))
    built = {}
    for name, spec in fields.items():
        dotted = f"{prefix}{name}"
        if dataclasses.is_dataclass(hints[name]):
            built[name] = _build(hints[name], tree.get(name, {}), f"{dotted}.", origin)
        else:
            built[name] = _leaf(spec, cls, tree, prefix, origin)
    return cls(**built)


def _leaf(
    spec: dataclasses.Field[Any],
    section: Any,
    tree: dict[str, Any],
    prefix: str,
    origin: dict[str, str],
) -> Any:
    """The value of an option. Raises UserError if it cannot be one."""
    dotted = f"{prefix}{spec.name}"
    if spec.name not in tree:
        origin[dotted] = DEFAULT
        return spec.default
    value = tree[spec.name]
    if spec.default == () and value == []:
        return ()
    label = f"{dotted} ({_escaped(origin.get(dotted, DEFAULT))})"
    return values.check(value, _types(section)[spec.name], spec.metadata, label)


def _unknown(key: Any, prefix: str, legal: list[str], origin: dict[str, str]) -> str:
    """What is said of a key that does not exist: where it is from, and what may have been meant,
    here or in another section."""
    dotted = f"{prefix}{key}"
    every = [option for option, _ in options()]
    if dotted in every:  # of a file; on the command line it would be the option
        *sections, tree = [*dotted.split(".")[:-1], f"{dotted.split('.')[-1]}: ..."]
        for section in reversed(sections):
            tree = f"{section}: {{{tree}}}"
        meant = f" write it as `{tree}`;"
    else:
        same = [option for option in every if option.rpartition(".")[2] == str(key)]
        near = difflib.get_close_matches(str(key)[:100], legal, n=1, cutoff=0.5)
        proposed = same or [f"{prefix}{word}" for word in near]
        proposed = proposed or difflib.get_close_matches(dotted[:100], every, n=1, cutoff=0.6)
        meant = f" did you mean {' or '.join(map(repr, proposed))}?" if proposed else ""
    return (
        f"Unknown key {shown(dotted)} ({origin.get(dotted, 'configuration')});{meant} "
        f"legal here: {', '.join(legal)}."
    )


# Options whose value is itself keys and values.
_MAPPINGS = ("task.verbalizer",)


def changed(config: Config, text: str) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (value in `text`, value now), where a configuration differs from one that
    `describe` wrote. Raises UserError for a text that is no configuration."""
    then = dict(leaves(reading.read_text(text, "the configuration that the run began with")))
    now = dict(leaves(config.to_dict()))
    return {
        key: (then.get(key), now.get(key))
        for key in {**now, **then}
        if key not in then or key not in now or then[key] != now[key]
    }


def refuse_without_effect(resolved: Resolved) -> None:
    """Raises UserError for a value that the user has given and that has no effect; a preset's may.

    Where plug-ins take part nothing is refused: what they read is not known.
    """
    given = dict(leaves(resolved.config.to_dict()))
    for key, when in without_effect(resolved):
        raise UserError(
            f"{key}={as_text(given[key])} ({_escaped(resolved.origin[key])}) has no effect here: "
            f"it counts if {when.words}; leave it out, or set that."
        )


def without_effect(resolved: Resolved) -> Iterator[tuple[str, When]]:
    """What the user has given and what has no effect, and when it would have one."""
    for key, spec in options():
        when = spec.metadata["counts"]
        dead = when is not None and not when.holds(resolved.config)
        if dead and key in resolved.changed and not resolved.config.plugins:
            yield key, when


def options(section: Any = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, dataclass field) of each option."""
    for spec in dataclasses.fields(section):
        below = _types(section)[spec.name]
        if dataclasses.is_dataclass(below):
            yield from options(below, f"{prefix}{spec.name}.")
        else:
            yield f"{prefix}{spec.name}", spec


def type_of(key: str) -> Any:
    """The type of the option with this dotted key."""
    section: Any = Config
    for part in key.split("."):
        section = _types(section)[part]
    return section


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of each value of a nested configuration; tuples as lists."""
    for key, value in tree.items():
        if isinstance(value, dict) and f"{prefix}{key}" not in _MAPPINGS:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def describe(resolved: Resolved) -> str:
    """The resolved configuration as YAML, each line with the source of its value."""
    lines = list(_lines(resolved.config.to_dict(), resolved.origin, "", 0))
    width = min(64, max(len(text) for text, _ in lines))
    return "\n".join(f"{text:<{width}}  # {source}" if source else text for text, source in lines)


def as_text(value: Any) -> str:
    """A value as it is written in a configuration or after section.key=, on one line."""
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.dump(plain, Dumper=_Dumper, default_flow_style=True, width=math.inf).strip()
    return text.removesuffix("...").strip()


class _Dumper(yaml.SafeDumper):
    """PyYAML's, on one line: a line break in a text is written as \\n."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        style = None if text.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _Dumper.represent_text)


def _escaped(source: str) -> str:
    """The name of a source as it may stand in a line: a file's name may hold line breaks."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in source)


def _lines(
    tree: dict[str, Any], origin: dict[str, str], prefix: str, depth: int
) -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, dict) and f"{prefix}{key}" not in _MAPPINGS:
            yield f"{'  ' * depth}{key}:", ""
            yield from _lines(value, origin, f"{prefix}{key}.", depth + 1)
        else:
            source = origin.get(f"{prefix}{key}", DEFAULT)
            yield f"{'  ' * depth}{key}: {as_text(value)}", _escaped(source)
