"""The description of a comparison: methods x tasks x seeds, and what is measured."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcfed.app.jobs import EXECUTORS
from hpcfed.app.sweep_file import check_cluster
from hpcfed.errors import UserError
from hpcfed.settings.reading import read_file, shown
from hpcfed.settings.resolve import as_text, leaves
from hpcfed.settings.values import nearest
from hpcfed.storage.paths import home

Options = dict[str, Any]  # section.key -> value

# What a description may hold, and its defaults; None: what the others say.
_KEYS: dict[str, Any] = {
    "source": "lora-fedavg",
    "folder": "",
    "cells": "",
    "executor": "local",
    "cluster": {},
    "overrides": {},
    "methods": [],
    "reference": "",
    "tasks": [],
    "models": [],
    "grid": {},
    "seeds": [1, 2, 3],
    "tune": {},
    "target": "100%",
    "score": "last",
    "keep_runs": True,
}
_OF_TUNE = ("tasks", "seed")  # beside the options that are tuned
_RESERVED = {
    "output": "each run has its own",
    "method": "name it in methods",
    "seed": "name them in seeds",
    "evaluation.test": "tuning runs never look at the test split, the others do",
}


@dataclass(frozen=True)
class Method:
    """A line of the table. tune: the values of its own to choose from, option -> list; or the name
    of the method whose choice it takes; empty: those that all have."""

    name: str
    options: Options
    tune: dict[str, list[Any]] | str = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Setting:
    """What all methods are compared on: a model, a task, a point of the grid; as labels, "" where
    there is one only."""

    task: str
    model: str
    condition: str
    options: Options

    @property
    def label(self) -> str:
        """How messages and files call it."""
        return ", ".join(part for part in (self.task, self.model, self.condition) if part)


@dataclass(frozen=True)
class Tune:
    """What is chosen on validation data. values: option -> values, of methods that bring none of
    their own. tasks: those that one choice is made on; none: each task has its own choice."""

    values: dict[str, list[Any]]
    tasks: tuple[str, ...]
    seed: int


@dataclass(frozen=True)
class Description:
    """A comparison. target: a share of the reference's last validation score if `relative`, else
    that score itself."""

    name: str
    source: str
    folder: Path
    cells: Path
    executor: str
    cluster: dict[str, Any]
    overrides: Options
    methods: tuple[Method, ...]
    reference: str
    settings: tuple[Setting, ...]
    seeds: tuple[int, ...]
    tune: Tune | None
    target: float
    relative: bool
    score: str
    keep_runs: bool

    def method(self, name: str) -> Method:
        """The method of that name."""
        return next(own for own in self.methods if own.name == name)

    def values(self, method: Method) -> dict[str, list[Any]]:
        """Option -> what is tried of it, of a method that is tuned itself."""
        assert self.tune is not None
        return method.tune if isinstance(method.tune, dict) and method.tune else self.tune.values


def tries(values: Mapping[str, list[Any]]) -> list[Options]:
    """All combinations of the values."""
    return [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]


def describes_comparison(source: str) -> bool:
    """Whether it is the file of a comparison."""
    return Path(source).is_file() and "methods" in read_file(Path(source))


def load(path: Path) -> Description:
    """From a YAML file. Raises UserError for what it may not hold."""
    return parse(read_file(path), str(path))


def parse(tree: Mapping[str, Any], name: str = "the comparison") -> Description:
    """From keys and values. Raises UserError for what they may not be."""
    unknown = next((key for key in tree if key not in _KEYS), None)
    if unknown is not None:
        raise UserError(
            f"{name}: unknown key {shown(unknown)};{nearest(str(unknown), _KEYS)} legal here: "
            f"{', '.join(_KEYS)}."
        )
    spec = {**_KEYS, **tree}
    if type(spec["target"]) in (int, float):
        spec["target"] = str(spec["target"])
    for key, default in _KEYS.items():
        if not isinstance(spec[key], type(default)):
            wanted = {str: "a text", dict: "keys and values", list: "a list", bool: "true or false"}
            raise UserError(f"{name}: {key} must be {wanted[type(default)]}, not {spec[key]!r}.")
    if not spec["folder"]:
        raise UserError(f"{name}: folder is missing; it is where runs and tables will lie.")
    for key, allowed in (("executor", EXECUTORS), ("score", ("last", "best"))):
        if spec[key] not in allowed:
            raise UserError(f"{name}: {key} is {spec[key]!r}; choose one of: {', '.join(allowed)}.")
    check_cluster(spec["cluster"], name)
    seeds = spec["seeds"]
    if not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise UserError(f"{name}: seeds must be whole numbers, as [1, 2, 3], not {seeds!r}.")
    _once(name, "seeds", [str(seed) for seed in seeds])
    methods = _methods(spec["methods"], name)
    settings = _settings(spec, name)
    tune = _tune(spec["tune"], seeds[0], settings, name)
    _check_tuning(methods, tune, name)
    names = [method.name for method in methods]
    reference = spec["reference"] or names[0]
    if reference not in names:
        raise UserError(
            f"{name}: reference is {reference!r}, which is none of the methods: {', '.join(names)}."
        )
    target, relative = _target(spec["target"], name)
    folder = home(spec["folder"])
    cells = home(spec["cells"]) if spec["cells"] else folder / "cells"
    return Description(
        name, spec["source"], folder, cells, spec["executor"],
        spec["cluster"], _options(spec["overrides"], f"{name}: overrides"), methods, reference,
        settings, tuple(seeds), tune, target, relative, spec["score"], spec["keep_runs"],
    )  # fmt: skip


def _options(tree: Any, where: str, more: tuple[str, ...] = ()) -> Options:
    """Flat options. Raises UserError for what a comparison sets itself. more: what may be there."""
    if not isinstance(tree, dict):
        raise UserError(f"{where} must be keys and values, not {shown(tree)}.")
    wrong = next((key for key in tree if not isinstance(key, str)), None)
    if wrong is not None:
        raise UserError(f"{where}: {wrong!r} is no option; write section.key.")
    found = dict(leaves(tree))
    for key, instead in _RESERVED.items():
        if key in found and key not in more:
            raise UserError(f"{where}: {key} is not to be set here, since {instead}; leave it out.")
    return found


def _once(name: str, what: str, labels: list[str]) -> None:
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise UserError(f"{name}: {what} has {twice!r} twice; leave one out, or name it otherwise.")


def _methods(items: list[Any], name: str) -> tuple[Method, ...]:
    if not items:
        raise UserError(f"{name}: methods is missing; list presets, as [lora-fedavg, fibecfed].")
    methods = []
    for number, item in enumerate(items, 1):
        where = f"{name}: method {number}"
        tree = {"method": item} if isinstance(item, str) else item
        if not isinstance(tree, dict) or not isinstance(tree.get("method"), str):
            raise UserError(
                f"{where} must be a preset's name, or keys and values with `method`, not "
                f"{shown(item)}."
            )
        tree = dict(tree)
        label, tune = tree.pop("name", tree["method"]), tree.pop("tune", {})
        if not isinstance(label, str) or not label:
            raise UserError(f"{where}: name must be a text, not {shown(label)}.")
        if not isinstance(tune, str):
            tune = _values(tune, f"{where}: tune")
        methods.append(Method(label, _options(tree, where, ("method",)), tune))
    _once(name, "methods", [method.name for method in methods])
    return tuple(methods)


def _values(tree: Any, where: str) -> dict[str, list[Any]]:
    """Option -> values to choose from."""
    for key, values in _options(tree, where).items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{where}.{key} must be a list of values, not {shown(values)}.")
    return dict(leaves(tree))


def _settings(spec: Mapping[str, Any], name: str) -> tuple[Setting, ...]:
    """Models x points of the grid x tasks."""
    tasks, models = (
        [
            (str(own[key]), own)
            for own in (
                _options({key: item} if isinstance(item, str) else item, f"{name}: {what}")
                for item in spec[what]
            )
            if _has(own, key, f"{name}: {what}")
        ]
        for what, key in (("tasks", "task.name"), ("models", "model.name"))
    )
    _once(name, "tasks", [label for label, _ in tasks])
    _once(name, "models", [label for label, _ in models])
    grid = _values(spec["grid"], f"{name}: grid")
    points = [
        (" ".join(f"{key.rpartition('.')[2]}={as_text(v)}" for key, v in point.items()), point)
        for point in tries(grid)
    ]
    return tuple(
        Setting(task, model if len(models) > 1 else "", point, {**of_model, **of_point, **of_task})
        for (model, of_model), (point, of_point), (task, of_task) in itertools.product(
            models or [("", {})], points, tasks or [("", {})]
        )
    )


def _has(options: Options, key: str, where: str) -> bool:
    if not isinstance(options.get(key), str):
        raise UserError(f"{where}: each must be a name, or keys and values with {key}.")
    return True


def _tune(
    tree: Mapping[str, Any], seed: int, settings: tuple[Setting, ...], name: str
) -> Tune | None:
    if not tree:
        return None
    own = {key: value for key, value in tree.items() if key in _OF_TUNE}
    values = _values({k: v for k, v in tree.items() if k not in own}, f"{name}: tune")
    tasks, chosen = own.get("tasks", []), own.get("seed", seed)
    known = dict.fromkeys(setting.task for setting in settings)
    if not isinstance(tasks, list) or any(task not in known for task in tasks):
        raise UserError(f"{name}: tune.tasks must be some of the tasks: {', '.join(known)}.")
    if type(chosen) is not int or chosen < 0:
        raise UserError(f"{name}: tune.seed must be a whole number, not {shown(chosen)}.")
    return Tune(values, tuple(tasks), chosen)


def _check_tuning(methods: tuple[Method, ...], tune: Tune | None, name: str) -> None:
    """Raises UserError unless all methods get as many tries, or those of another."""
    if tune is None:
        own = next((method.name for method in methods if method.tune), None)
        if own is not None:
            raise UserError(
                f"{name}: method {own} has `tune`, but the comparison has none; give all the same "
                "budget with `tune: {local.lr: [...]}`, or none."
            )
        return
    by_name = {method.name: method for method in methods}
    budgets: dict[str, int] = {}
    for method in methods:
        where = f"{name}: method {method.name}"
        if isinstance(method.tune, str):
            of = by_name.get(method.tune)
            if of is None or isinstance(of.tune, str):
                raise UserError(
                    f"{where}: tune is {method.tune!r}, which is no method that is tuned itself."
                )
            continue
        values = method.tune or tune.values
        if not values:
            raise UserError(f"{where}: tune says no values to choose from, as local.lr: [...].")
        twice = next((key for key in values if key in method.options), None)
        if twice is not None:
            raise UserError(f"{where}: {twice} is set and tuned too; leave one out.")
        budgets[method.name] = len(tries(values))
    if len(set(budgets.values())) > 1:
        said = ", ".join(f"{own} {number}" for own, number in budgets.items())
        raise UserError(f"{name}: all methods must be tuned with as many tries; they have: {said}.")


def _target(text: str, name: str) -> tuple[float, bool]:
    """(value, whether it is a share of the reference's score)."""
    relative = text.endswith("%")
    try:
        value = float(text.removesuffix("%"))
        if not (0 < value <= 100 if relative else -1 <= value <= 1):
            raise ValueError
    except ValueError:
        raise UserError(
            f"{name}: target is {text!r}; it must be a share of the reference's last validation "
            "score, as 95%, or a score, as 0.8."
        ) from None
    return (value / 100 if relative else value), relative
