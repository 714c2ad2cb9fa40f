"""What finished or running runs tell, for `hpcfed report`.

Runs that differ in nothing but the seed are one curve; what else differs between the curves is
their legend.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from hpcfed.app.spending import spent
from hpcfed.errors import UserError
from hpcfed.settings.resolve import leaves
from hpcfed.storage.checks import DamageError, read_object
from hpcfed.storage.paths import CONFIG, METRICS, PARTITION, PREDICTIONS, SUMMARY

# Two runs that differ only in these are two samples of the same thing.
_SAME = ("seed", "output", "cluster.", "deepspeed")
# What a score is drawn over: the axis's name, and the key of Point.
AXES = (
    ("rounds", "round"),
    ("seconds", "seconds"),
    ("samples processed by clients", "samples"),
    ("MB uploaded", "up"),
)


@dataclass(frozen=True)
class Point:
    """A validation: its score, and what had been spent until then (up in MB; seconds of rounds,
    validation included)."""

    round: int
    seconds: float
    samples: int
    up: float
    score: float


@dataclass(frozen=True)
class Run:
    """A run directory: its configuration, flat, without what does not matter; its points; the lines
    of metrics.jsonl; and what is there of partition.json, predictions.json, summary.json."""

    path: Path
    settings: dict[str, Any]
    points: tuple[Point, ...]
    records: list[dict[str, Any]]
    partition: dict[str, Any]
    predictions: dict[str, Any]
    summary: dict[str, Any]
    configuration: str

    @property
    def chance(self) -> float | None:
        """What always the most frequent class would give, of the validation rows; None where the
        score is no accuracy."""
        told = [r["validation"]["personal"] for r in self.records if "validation" in r]
        counts = self.partition.get("validation", [])
        sums = [sum(column) for column in zip(*counts, strict=True)]
        if not told or told[-1].get("accuracy") != told[-1]["score"] or not sum(sums):
            return None
        return max(sums) / sum(sums)

    def of_clients(self) -> dict[int, float]:
        """Client -> accuracy of its own model on its own test rows, if the run is complete."""
        told = self.predictions
        if "client" not in told or "accuracy" not in self.summary:
            return {}
        right: dict[int, list[bool]] = {}
        for k, own, label in zip(told["client"], told["personal"], told["label"], strict=True):
            right.setdefault(k, []).append(own == label)
        return {k: mean(own) for k, own in sorted(right.items())}


def find(folders: Sequence[Path]) -> list[Path]:
    """Run directories among these and, of a sweep's folder, in them; files beside them, as a
    sweep's jobs.json, are passed over. Raises UserError if there is none."""
    found: list[Path] = []
    for folder in folders:
        if not folder.exists():
            raise UserError(f"{folder} does not exist; give a run directory, or a sweep's folder.")
        inside = [folder] if (folder / METRICS).is_file() else []
        if folder.is_dir() and not inside:
            inside = sorted(own.parent for own in folder.glob(f"*/{METRICS}"))
        if folder.is_dir() and not inside:
            raise UserError(
                f"{folder} is no run directory (it has no {METRICS}), nor does it hold one; give "
                "what a run's `output` names."
            )
        found += [own for own in inside if own not in found]
    if not found:
        raise UserError("There is no run directory among these; give what a run's `output` names.")
    return found


def read(folder: Path) -> Run:
    """What a run directory tells. Raises UserError if it cannot be read."""
    try:
        text = (folder / METRICS).read_text()
        configuration = (folder / CONFIG).read_text()
        tree = yaml.safe_load(configuration)
        # A line without an end is being written, or was when the run was killed.
        records = [json.loads(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"]
        partition, predictions, summary = [
            read_object(folder / name) if (folder / name).is_file() else {}
            for name in (PARTITION, PREDICTIONS, SUMMARY)
        ]
        points = tuple(_points(records))
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError, DamageError) as error:
        raise UserError(f"{folder} is no run directory that can be read ({error!r}).") from None
    settings = {
        key: str(value) for key, value in leaves(tree) if not key.startswith(_SAME)
    }  # lists too, so that they can be compared
    return Run(folder, settings, points, records, partition, predictions, summary, configuration)


def _points(records: list[dict[str, Any]]) -> Iterator[Point]:
    for record, so_far in zip(records, spent(records), strict=True):
        if "validation" not in record:
            continue
        score = record["validation"]["personal"]["score"]
        if score is not None:  # it was finite
            seconds, samples, up = (so_far[key] for key in ("seconds", "samples", "up"))
            yield Point(record["round"], seconds, samples, up / 1e6, score)


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


def by_round(runs: Sequence[Run]) -> list[list[Point]]:
    """For each round that all runs were validated in, the point of each."""
    runs = [run for run in runs if run.points]
    if not runs:
        return []
    known = [{p.round: p for p in run.points} for run in runs]
    rounds = sorted(set(known[0]).intersection(*known[1:]))
    return [[points[round_number] for points in known] for round_number in rounds]
