"""How far runs have got, read from their files: nothing is written, and no lock is taken.

A round counts when it is committed. Seconds of a round are those of its phases, evaluation
and draws that came to nothing included, as a mean over the last rounds, since a curriculum's grow.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from hpcfed.app.cells import FORMAT, Cell
from hpcfed.app.jobs import TURN, Status, known_jobs, status_of
from hpcfed.app.spending import seconds
from hpcfed.storage.checks import DamageError, as_object, digest, read_bytes, read_object
from hpcfed.storage.files import holder
from hpcfed.storage.paths import CONFIG, LOCK, MANIFEST, METRICS, SUMMARY

LATEST = 5  # rounds whose seconds say what the next will take
# All states, in the order in which they are counted.
STATES = (
    "complete", "running", "waiting", "pending", "begun", "stopped", "failed", "damaged", "new",
)  # fmt: skip
BAD = ("failed", "damaged")


@dataclass(frozen=True)
class Standing:
    """How far a run has got. state: of STATES. planned: rounds in all, None where no file says so.
    validation: the latest score, after the round `validated`. each: seconds a round. why: lines
    that say why it does not go on."""

    name: str
    state: str
    job: str
    rounds: int
    planned: int | None
    validation: float | None = None
    validated: int | None = None
    each: float | None = None
    why: tuple[str, ...] = ()

    @property
    def left(self) -> float | None:
        """Seconds that the missing rounds would take at its own pace; None: nothing is known."""
        if self.state == "complete":
            return 0.0
        if self.planned is None or self.each is None:
            return None
        return (self.planned - self.rounds) * self.each

    def row(self) -> dict[str, Any]:
        """For the table."""
        planned = "?" if self.planned is None else self.planned
        return {
            "run": self.name,
            "state": self.state,
            "rounds": f"{self.rounds}/{planned}",
            "validation": self.validation,
            "s/round": self.each,
            "left": None if self.left is None else clock(self.left),
        }

    def tree(self) -> dict[str, Any]:
        """For programs."""
        return {
            "run": self.name, "state": self.state, "job": self.job or None, "rounds": self.rounds,
            "planned": self.planned, "validation": self.validation, "validated": self.validated,
            "seconds_a_round": self.each, "seconds_left": self.left, "why": list(self.why),
        }  # fmt: skip


def of_runs(
    folder: Path, names: Iterable[str], planned: Mapping[str, int] | None = None
) -> list[Standing]:
    """How far the runs folder/name have got. planned: rounds of runs that may not have begun."""
    jobs = known_jobs(folder)
    return [
        _standing(folder, status_of(folder, name, jobs.get(name)), jobs, (planned or {}).get(name))
        for name in names
    ]


def _standing(
    folder: Path, status: Status, jobs: Mapping[str, Mapping[str, Any]], planned: int | None
) -> Standing:
    run, state, why = folder / status.name, status.state, tuple(status.log)
    if state == "failed" and not why:
        why = ("it left no words",)
    elif state == "waiting":
        turn = (folder / TURN).read_text().strip()
        whose = next((name for name, own in jobs.items() if own["job"] == turn), f"job {turn}")
        why = (f"for its turn, which {whose} has",)
    elif state == "pending":
        why = (f"in Slurm's queue, as job {status.job}",)
    elif state == "stopped":
        why = ("nobody runs it; with --resume it goes on from its last committed round",)
    elif state == "begun":
        by = holder(run / LOCK)[1]
        why = (f"by {by}, which cannot be seen from here" if by else "by nobody who can be named",)
    try:
        rounds, told, records = _committed(run)
    except DamageError as damage:
        return Standing(status.name, "damaged", status.job, status.rounds, planned, why=(
            f"{damage}", *why))  # fmt: skip
    scores = [(r["round"], r["validation"]["personal"]["score"]) for r in records
              if "validation" in r]  # fmt: skip
    validated, score = scores[-1] if scores else (None, None)
    took = [seconds(record) for record in records[-LATEST:]]
    return Standing(
        status.name, state, status.job, rounds, told or planned, score, validated,
        mean(took) if took else None, why,
    )  # fmt: skip


def _committed(run: Path) -> tuple[int, int | None, list[dict[str, Any]]]:
    """Rounds done, rounds in all if they are known, and the lines of metrics.jsonl that are
    committed. Raises DamageError."""
    if not run.is_dir():
        return 0, None, []
    if (run / SUMMARY).exists():
        read_object(run / SUMMARY)
    elif not any((run / name).exists() for name in (MANIFEST, METRICS, CONFIG)):
        return 0, None, []
    file = run / MANIFEST
    manifest = read_object(file)
    try:
        rounds, planned, size = manifest["rounds"], manifest["planned"], manifest["metrics"]
        content = read_bytes(run / METRICS)[: size["bytes"]]
        same = digest(content) == size["sha256"]
        if not 0 <= rounds <= planned:
            raise ValueError(f"rounds is {rounds} of {planned}")
    except KeyError as error:
        raise DamageError(file, f"lacks {error}: it is damaged, or of another hpcfed") from None
    except (TypeError, ValueError) as error:
        raise DamageError(file, f"is damaged ({error})") from None
    if not same:
        raise DamageError(run / METRICS, "is not what was committed (its checksum differs)")
    try:
        records = [as_object(line) for line in content.splitlines()]
        for record in records:
            seconds(record)
    except (KeyError, TypeError, ValueError) as error:
        raise DamageError(run / METRICS, f"is damaged ({error})") from None
    return rounds, planned, records


def of_cell(name: str, cell: Cell) -> Standing:
    """Of a run that is kept as a cell."""
    rounds, last = cell.content["settings"]["federation.rounds"], cell.curve[-1]
    each = cell.spent["seconds"] / rounds
    return Standing(name, "complete", "", rounds, rounds, last["score"], last["round"], each)


def in_folder(folder: Path, cells: Path | None = None) -> list[Standing]:
    """Of all runs in a folder, those in its jobs.json first. cells: where results of runs are kept
    whose folders have been removed."""
    inside = sorted(own.parent.name for own in folder.glob(f"*/{METRICS}"))
    names = [name for name in dict.fromkeys([*known_jobs(folder), *inside]) if name[0] != "."]
    kept = {} if cells is None else _kept(cells, [n for n in names if not (folder / n).is_dir()])
    found = {own.name: own for own in of_runs(folder, [n for n in names if n not in kept])}
    return [kept.get(name) or found[name] for name in names]


def _kept(cells: Path, names: Sequence[str]) -> dict[str, Standing]:
    """Those of the runs that are cells: a run's name ends as its cell's begins."""
    found = {}
    for name in names:
        for file in cells.glob(f"{name.rpartition('-')[2]}*.json"):
            try:
                content = read_object(file)
            except DamageError:
                continue
            if content.get("format") == FORMAT:
                found[name] = of_cell(name, Cell(content))
    return found


def total(found: Sequence[Standing]) -> dict[str, Any]:
    """Of all runs: how many in each state, rounds, and seconds for all that is missing, with as
    many runs side by side as run now; a run without a pace has the others' mean. None: not known.
    """
    states = Counter(own.state for own in found)
    planned = [own.planned for own in found if own.state != "damaged"]
    paces = [own.each for own in found if own.each is not None]
    left: float | None = None
    if None not in planned and paces:
        pace = mean(paces)
        each = [
            ((own.planned or own.rounds) - own.rounds) * (own.each or pace)
            for own in found
            if own.state != "complete"
        ]
        left = sum(each) / max(1, states["running"])
    return {
        "runs": len(found),
        "states": {state: states[state] for state in STATES if states[state]},
        "rounds": sum(own.rounds for own in found),
        "planned": None if None in planned else sum(own or 0 for own in planned),
        "seconds_left": left,
    }


def show(found: Sequence[Standing], unchosen: int = 0, as_json: bool = False) -> int:
    """Print it, for a person or for programs; exit code 1 if a run has failed or is damaged.
    unchosen: runs whose values are chosen later."""
    if as_json:
        sums = {**total(found), "unchosen": unchosen}
        print(json.dumps({"runs": [own.tree() for own in found], "total": sums}, indent=1))
    else:
        print("\n".join(_lines(found, unchosen)))
    return int(any(own.state in BAD for own in found))


def _lines(found: Sequence[Standing], unchosen: int) -> list[str]:
    """The table, the total of several, and why runs do not go on."""
    shown = [table([own.row() for own in found])]
    if len(found) > 1 or unchosen:
        sums = total(found)
        counted = ", ".join(f"{number} {state}" for state, number in sums["states"].items())
        rounds = f"{sums['rounds']}/{'?' if sums['planned'] is None else sums['planned']} rounds"
        left = sums["seconds_left"]
        about = "" if not left else f", about {clock(left)} left"
        later = f"; {unchosen} more wait for tuned values" if unchosen else ""
        shown.append(f"\n{sums['runs']} runs: {counted}; {rounds}{about}{later}")
    return [*shown, *reasons(found)]


def reasons(found: Iterable[Standing | Status]) -> list[str]:
    """Why runs do not go on: of failed ones the last words, of others a line."""
    shown = []
    for own in found:
        why = own.log if isinstance(own, Status) else own.why
        if own.state == "failed":
            shown.append(f"\n{own.name} failed (job {own.job}, {own.rounds} rounds committed):")
            shown += [f"    {line}" for line in why or ["it left no words"]]
        elif why:
            shown.append(f"{own.name} {own.state}: {why[0]}")
    return shown


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([_shown(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
    made = [
        "| " + " | ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    return "\n".join([made[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *made[1:]])


def clock(seconds: float) -> str:
    """As 1:02:03, or 2:03."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
