"""What a comparison comes to, from its finished cells: a row for each setting and method."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any

import numpy as np

from hpcfed.app import bootstrap
from hpcfed.app.cells import Cell, Rows
from hpcfed.app.compare import Comparison
from hpcfed.app.compare_file import Method, Setting
from hpcfed.errors import UserError
from hpcfed.settings.resolve import as_text

COSTS = ("round", "seconds", "samples", "up")  # what is read off a curve; up: bytes
CHANCE = 0.02  # a reference that is no further above the majority class has learned nothing


@dataclass
class Row:
    """A method in a setting. All means are over its finished seeds.

    difference, low, high: to the reference, over the seeds that both have finished, with the
    interval of the bootstrap. lag: the interval of the difference to the best method; None: it is
    the best, or nothing can be said. cost: what had been spent when the validation score first
    reached the target, None: never; of how many seeds `reached` says. to_target, in_all: what that
    was, and what all rounds were, as a share of the reference's for the same seeds.
    """

    setting: Setting
    method: str
    tuned: str
    seeds: tuple[int, ...]
    score: float
    spread: float | None
    low_score: float
    high_score: float
    shared_score: float
    majority: float | None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    best: bool = False
    near: bool = False  # behind the best, but not significantly
    cost: dict[str, float | None] = field(default_factory=dict)
    reached: int = 0
    to_target: dict[str, float | None] = field(default_factory=dict)
    in_all: dict[str, float | None] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """win, tie or loss against the reference, by the interval; "" if there is none."""
        if self.low is None or self.high is None:
            return ""
        return "win" if self.low > 0 else "loss" if self.high < 0 else "tie"


def rows(comparison: Comparison) -> list[Row]:
    """All rows of which some seed is finished, settings and methods in the description's order."""
    found: list[Row] = []
    for setting in comparison.spec.settings:
        found += _of_setting(comparison, setting)
    return found


def budget(comparison: Comparison) -> str:
    """How methods are tuned, in a sentence."""
    spec = comparison.spec
    if spec.tune is None:
        return "not tuned: each method has its preset's or the description's values"
    own = next(m for m in spec.methods if not isinstance(m.tune, str))
    values = spec.values(own)
    number = int(np.prod([len(each) for each in values.values()]))
    where = f"on {', '.join(spec.tune.tasks)}" if spec.tune.tasks else "on each task"
    first = spec.settings[0].condition
    if first and len({setting.condition for setting in spec.settings}) > 1:
        where += f" at {first}"
    return (
        f"{', '.join(values)} tuned with {number} tries a method {where}, seed {spec.tune.seed}, "
        "by the mean validation score of the second half of the rounds"
    )


def _of_setting(comparison: Comparison, setting: Setting) -> Iterator[Row]:
    spec = comparison.spec
    which = spec.score
    cells = {method.name: _cells(comparison, method, setting) for method in spec.methods}
    cells = {name: own for name, own in cells.items() if own}
    if not cells:
        return
    _check_rows(comparison, setting, cells)
    reference = cells.get(spec.reference, {})
    made = [
        _row(comparison, setting, spec.method(name), own, reference) for name, own in cells.items()
    ]
    # Only methods with all seeds of the fullest can be the best.
    most = max(len(row.seeds) for row in made)
    best = max((row for row in made if len(row.seeds) == most), key=lambda row: row.score)
    best.best = True
    for row in made:
        if row is not best and len(row.seeds) == most:
            gap = _interval(cells[row.method], cells[best.method], which)
            row.near = gap is not None and gap[1] >= 0
    yield from made


def _cells(comparison: Comparison, method: Method, setting: Setting) -> dict[int, Cell]:
    """Seed -> the method's finished cell."""
    found = {}
    for seed in comparison.spec.seeds:
        wanted = comparison.final(method, setting, seed)
        cell = None if wanted is None else comparison.cell(wanted)
        if cell is not None:
            found[seed] = cell
    return found


def _check_rows(
    comparison: Comparison, setting: Setting, cells: dict[str, dict[int, Cell]]
) -> None:
    """Raises UserError if a seed's cells are not of the same data."""
    for seed in comparison.spec.seeds:
        own = {name: by_seed[seed] for name, by_seed in cells.items() if seed in by_seed}
        if len({cell.content["data"] for cell in own.values()}) > 1:
            raise UserError(
                f"{comparison.spec.name}, {setting.label}, seed {seed}: the cells of "
                f"{', '.join(own)} are not all of the same data; remove the older ones from "
                f"{comparison.spec.cells}."
            )


def _row(
    comparison: Comparison,
    setting: Setting,
    method: Method,
    cells: dict[int, Cell],
    reference: dict[int, Cell],
) -> Row:
    spec, which = comparison.spec, comparison.spec.score
    scores = [_number(cell.score(which)) for cell in cells.values()]
    chosen = comparison.chosen(method, setting) or {}
    row = Row(
        setting,
        method.name,
        " ".join(as_text(value) for value in chosen.values()),
        tuple(cells),
        mean(scores),
        stdev(scores) if len(scores) > 1 else None,
        min(scores),
        max(scores),
        mean(_number(cell.score(which, "global")) for cell in cells.values()),
        next(iter(cells.values())).content["majority"],
        spent={key: mean(cell.spent[key] for cell in cells.values()) for key in COSTS[1:]},
    )
    both = [seed for seed in cells if seed in reference]
    if not both:
        return row
    pairs = [(cells[seed], reference[seed]) for seed in both]
    _add_costs(row, pairs, lambda cell: spec.target * (last(cell) if spec.relative else 1.0))
    if method.name != spec.reference:
        ours, theirs = ({seed: own[seed] for seed in both} for own in (cells, reference))
        row.difference = mean(_number(a.score(which)) - _number(b.score(which)) for a, b in pairs)
        row.low, row.high = _interval(ours, theirs, which) or (None, None)
    return row


def _add_costs(
    row: Row, pairs: Sequence[tuple[Cell, Cell]], target: Callable[[Cell], float]
) -> None:
    """What it takes to the target, and in all, beside the reference. pairs: (own, reference's) cell
    of each seed. target: of the reference's cell."""
    reached = [(spent_at(a, target(b)), spent_at(b, target(b))) for a, b in pairs]
    own = [ours for ours, _ in reached if ours is not None]
    row.reached = len(own)
    both = [(ours, theirs) for ours, theirs in reached if ours is not None and theirs is not None]
    for key in COSTS:
        row.cost[key] = mean(point[key] for point in own) if own else None
        row.to_target[key] = _share([(a[key], b[key]) for a, b in both])
        if key != "round":
            row.in_all[key] = _share([(a.spent[key], b.spent[key]) for a, b in pairs])


def last(cell: Cell) -> float:
    """The last validation score."""
    return _number(cell.curve[-1]["score"])


def spent_at(cell: Cell, target: float) -> dict[str, float] | None:
    """The first point of the curve that reaches the target; None: never."""
    return next((point for point in cell.curve if _number(point["score"]) >= target), None)


def _share(pairs: Sequence[tuple[float, float]]) -> float | None:
    theirs = sum(b for _, b in pairs)
    return sum(a for a, _ in pairs) / theirs if theirs else None


def _interval(
    ours: dict[int, Cell], theirs: dict[int, Cell], which: str
) -> tuple[float, float] | None:
    """The bootstrap's interval of a difference over the same seeds; None where there are no rows,
    or not the same ones."""
    runs: list[list[Rows]] = [[], []]
    for seed in ours:
        pair = [own[seed].rows(which) for own in (ours, theirs) if seed in own]
        found = [rows for rows in pair if rows is not None]
        if len(found) < 2 or found[0].same != found[1].same:
            return None
        for own, one in zip(runs, found, strict=True):
            own.append(one)
    drawn = bootstrap.scores(runs)
    return bootstrap.interval(drawn[:, 0] - drawn[:, 1])


def _number(value: float | None) -> float:
    """A score that was not finite is none."""
    return float("-inf") if value is None else value


@dataclass(frozen=True)
class Total:
    """A method over all tasks of a model and a point of the grid. average: macro, None unless all
    tasks are there. to_target: mean over tasks of the shares where it is reached; reached: of how
    many tasks."""

    method: str
    average: float | None
    wins: int
    ties: int
    losses: int
    to_target: dict[str, float | None]
    reached: int
    tasks: int


def totals(found: Sequence[Row], tasks: int) -> list[Total]:
    """The totals of rows of one model and condition. tasks: how many there are."""
    result = []
    for name in dict.fromkeys(row.method for row in found):
        own = [row for row in found if row.method == name]
        verdicts = [row.verdict for row in own]
        shares = {
            key: [row.to_target[key] for row in own if row.to_target.get(key) is not None]
            for key in COSTS
        }
        average = mean(row.score for row in own) if len(own) == tasks else None
        means = {
            key: mean(v for v in each if v is not None) if each else None
            for key, each in shares.items()
        }
        wins, ties, losses = (verdicts.count(each) for each in ("win", "tie", "loss"))
        reached = len(shares["samples"])
        result.append(Total(name, average, wins, ties, losses, means, reached, tasks))
    return result


def at_chance(found: Sequence[Row], reference: str) -> list[str]:
    """Labels of the settings in which the reference has learned nothing, so that reaching its score
    costs nothing."""
    return [
        row.setting.label or "this task"
        for row in found
        if row.method == reference
        and row.majority is not None
        and row.score <= row.majority + CHANCE
    ]


def curves(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """A line for each validation of each finished final run."""
    spec = comparison.spec
    for setting in spec.settings:
        for method in spec.methods:
            for seed, cell in _cells(comparison, method, setting).items():
                for point in cell.curve:
                    yield {
                        "task": setting.task, "model": setting.model,
                        "condition": setting.condition, "method": method.name, "seed": seed,
                        "round": point["round"], "validation": point["score"],
                        "samples": point["samples"], "bytes_up": point["up"],
                        "bytes_down": point["down"], "seconds": point["seconds"],
                    }  # fmt: skip
