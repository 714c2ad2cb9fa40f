"""`hpcfed plot`: validation scores of finished or running runs, as curves one can look at.

Runs that differ in nothing but the seed are one curve, the mean, with a band from the lowest to the
highest; what else differs between the curves is their legend.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from hpcfed.errors import UserError
from hpcfed.settings.resolve import leaves
from hpcfed.storage.paths import CONFIG, METRICS

# Two runs that differ only in these are two samples of the same thing.
_SAME = ("seed", "output", "cluster.", "deepspeed")
# What a score is drawn over: the axis's name, and the key of Point.
AXES = (("rounds", "round"), ("samples processed by clients", "samples"), ("MB uploaded", "up"))


@dataclass(frozen=True)
class Point:
    """A validation: its score, and what had been spent until then (up in MB)."""

    round: int
    samples: int
    up: float
    score: float


@dataclass(frozen=True)
class Run:
    """A run directory: its configuration, flat, without what does not matter, and its points."""

    settings: dict[str, Any]
    points: tuple[Point, ...]


def read(folder: Path) -> Run:
    """What a run directory tells. Raises UserError if there is nothing to draw in it."""
    try:
        text = (folder / METRICS).read_text()
        tree = yaml.safe_load((folder / CONFIG).read_text())
    except OSError as error:
        raise UserError(
            f"{folder} is no run directory ({error.filename} cannot be read); give what a run's "
            "`output` names."
        ) from None
    # A line without an end is being written, or was when the run was killed.
    records = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    points = tuple(_points(records))
    if not points:
        raise UserError(
            f"{folder} has no validation yet: wait for its first, or set data.validation and "
            "evaluation.every in the next run."
        )
    settings = {
        key: str(value) for key, value in leaves(tree) if not key.startswith(_SAME)
    }  # lists too, so that they can be compared
    return Run(settings, points)


def _points(records: list[dict[str, Any]]) -> Iterator[Point]:
    samples, up = 0, 0.0
    for record in records:
        samples += record["samples"]
        up += record["bytes"]["up"] / 1e6
        if "validation" in record:
            score = record["validation"]["personal"]["score"]
            if score is None:  # it was not finite
                continue
            yield Point(record["round"], samples, up, score)


def curves(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Legend -> the runs of that curve, in the order given."""
    groups: list[list[Run]] = []
    for run in runs:
        for group in groups:
            if group[0].settings == run.settings:
                group.append(run)
                break
        else:
            groups.append([run])
    first = [group[0].settings for group in groups]
    keys = dict.fromkeys(key for settings in first for key in settings)
    differ = [key for key in keys if len({settings.get(key) for settings in first}) > 1]
    if "method" in differ:  # a method's own values go without saying, where they tell nothing more
        methods = [settings["method"] for settings in first]
        if len(set(methods)) == len(methods):
            differ = ["method"]
    by_legend = {}
    for group, settings in zip(groups, first, strict=True):
        parts = [
            settings[key] if key in ("method", "task.name") else f"{key}={settings.get(key)}"
            for key in differ
        ] or [settings.get("method", "")]
        seeds = f" ({len(group)} runs)" if len(group) > 1 else ""
        by_legend[", ".join(parts) + seeds] = group
    return by_legend


def _by_round(runs: Sequence[Run]) -> list[list[Point]]:
    """For each round that all runs were validated in, the point of each."""
    known = [{p.round: p for p in run.points} for run in runs]
    rounds = sorted(set(known[0]).intersection(*known[1:]))
    return [[points[round_number] for points in known] for round_number in rounds]


def draw(folders: Sequence[Path], output: Path) -> None:
    """Draw the runs' validation scores over rounds, samples and uploads to a PNG, PDF or SVG.

    Raises UserError if something is missing.
    """
    runs = [read(folder) for folder in folders]
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise UserError("Plots need matplotlib: `pip install matplotlib`.") from None
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    panels = figure.subplots(1, len(AXES), sharey=True)
    for number, (legend, group) in enumerate(curves(runs).items()):
        columns = _by_round(group)
        for panel, (_, key) in zip(panels, AXES, strict=True):
            x = [mean(getattr(p, key) for p in column) for column in columns]
            y = [mean(p.score for p in column) for column in columns]
            color = f"C{number % 10}"
            panel.plot(x, y, marker="o", markersize=3, label=legend, color=color)
            if len(group) > 1:
                low, high = ([pick(p.score for p in c) for c in columns] for pick in (min, max))
                panel.fill_between(x, low, high, alpha=0.15, linewidth=0, color=color)
    tasks = {run.settings["task.name"] for run in runs}
    panels[0].set_ylabel("personal validation score")
    for panel, (name, _) in zip(panels, AXES, strict=True):
        panel.set_xlabel(name)
        panel.set_xlim(left=0)
        panel.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        panel.grid(alpha=0.3)
    figure.suptitle(", ".join(sorted(tasks)))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)))
    try:
        figure.savefig(output, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(
            f"The plot cannot be written to {output} ({error}); give another -o."
        ) from None
