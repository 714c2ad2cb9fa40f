"""Many runs from one description: each a job with an MPI world of its own.

    sweep = Sweep.load("launch/experiments/small.yaml")
    sweep.submit()          # again: only what failed or was never submitted
    sweep.wait()
    print(sweep.table())

How they are started, and what has become of them: jobs.py.
"""

import itertools
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hpcfed.app.jobs import CLUSTER, Jobs, Status
from hpcfed.app.status import Standing, of_runs, table
from hpcfed.app.sweep_file import asks_for_gpus, checked
from hpcfed.errors import UserError
from hpcfed.rounds.preflight import check_options
from hpcfed.settings.reading import given_once, read_file
from hpcfed.settings.resolve import Resolved, as_text, leaves, resolve
from hpcfed.storage.checks import read_object
from hpcfed.storage.paths import SUMMARY, home

POLL_SECONDS = 2.0


class Sweep:
    """A description, its runs, and the folder that holds them.

    runs: name -> the overrides of `source`. A run's directory is folder/name.
    """

    def __init__(self, description: Mapping[str, Any], name: str = "the sweep") -> None:
        """Raises UserError for whatever a run would be refused for before it reads data."""
        spec = checked(description, name)
        self.source: str = spec["source"]
        self.folder = home(spec["folder"])
        cluster = {**CLUSTER, **spec["cluster"]}
        self.nodes: int = cluster["nodes"]
        self.tasks_per_node: int = cluster["tasks_per_node"]
        fixed = {"cluster.device": "cuda"} if asks_for_gpus(spec) else {}
        fixed |= dict(leaves(spec["overrides"]))
        self.varied = dict(_varied(spec))
        self.runs = {
            run: _words({**fixed, **dict(leaves(values)), "output": str(self.folder / run)})
            for run, values in self.varied.items()
        }
        self.jobs = Jobs(
            self.folder, spec["executor"], cluster,
            {run: (self.source, *words) for run, words in self.runs.items()},
        )  # fmt: skip
        for run in self.runs:
            try:
                check_options(self.resolved(run), self.jobs.tasks)
            except UserError as error:
                raise UserError(f"{name}, run {run}: {error}") from None

    @staticmethod
    def load(path: str | Path, executor: str | None = None) -> "Sweep":
        """From a YAML file; `executor` wins over the file's."""
        tree = read_file(Path(path))
        return Sweep(tree if executor is None else {**tree, "executor": executor}, str(path))

    def resolved(self, run: str, overrides: Sequence[str] = ()) -> Resolved:
        """The configuration of a run. Raises UserError as `hpcfed.settings.resolve.resolve`."""
        words = _joined(self.runs[run], overrides)
        given_once(words)
        return resolve(self.source, words)

    def line(self, number: int, overrides: Sequence[str] = ()) -> list[str]:
        """The words after `hpcfed run` of run `number`, from 0, for a job array of one's own.

        overrides: key=value, which win over the sweep's.
        """
        if not 0 <= number < len(self.runs):
            raise UserError(
                f"There is no run {number}: the sweep has {len(self.runs)}, numbered from 0; use "
                f"--array=0-{len(self.runs) - 1}."
            )
        return [self.source, *_joined(list(self.runs.values())[number], overrides)]

    def submit(self) -> list[str]:
        """Submit what has failed or was never submitted; returns the names."""
        wanted = [run.name for run in self.status() if run.state in ("new", "failed")]
        self.jobs.submit(wanted)
        return wanted

    def status(self) -> list[Status]:
        """What has become of each run."""
        return self.jobs.status()

    def standings(self) -> list[Standing]:
        """How far each run has got."""
        planned = {run: self.resolved(run).config.federation.rounds for run in self.runs}
        return of_runs(self.folder, self.runs, planned)

    def wait(self) -> list[Status]:
        """Until no run is pending, waiting or running; what has become of each."""
        while True:
            runs = self.status()
            if all(run.over for run in runs):
                return runs
            time.sleep(POLL_SECONDS)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each run: what is varied, its state and, once it is complete, its result."""
        rows = []
        for run in self.status():
            row = {"run": run.name, **self.varied[run.name], "state": run.state}
            if run.state == "complete":
                result = read_object(self.folder / run.name / SUMMARY)
                scores = result.get("accuracy") or result.get("score") or {}
                row |= {
                    **{name: scores.get(name) for name in ("personal", "global")},
                    "best round": result["best"]["round"] if result["best"] else None,
                    "samples": result["samples"],
                    "MB up": result["bytes"]["up"] / 1e6,
                    "seconds": result["seconds"]["total"],
                }
            rows.append(row)
        return rows

    def table(self) -> str:
        """`rows` as a Markdown table."""
        return table(self.rows())


def _varied(spec: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name -> what is varied: each item of the list with each point of the grid."""
    seen: dict[str, int] = {}
    for item in spec["list"] or [{}]:
        for point in itertools.product(*spec["grid"].values()):
            values = {**item, **dict(zip(spec["grid"], point, strict=True))}
            parts = [f"{key.rpartition('.')[2]}={value}" for key, value in values.items()]
            name = re.sub(r"[^\w.=+-]+", "-", ",".join(parts).replace(",", "_")) or "run"
            seen[name] = seen.get(name, 0) + 1
            yield name if seen[name] == 1 else f"{name}-{seen[name]}", values


def _words(values: Mapping[str, Any]) -> list[str]:
    """Overrides, as the command line takes them."""
    return [f"{key}={as_text(value)}" for key, value in values.items()]


def _joined(words: Sequence[str], later: Sequence[str]) -> list[str]:
    """Overrides of which the later win, each key once. Raises UserError for another output."""
    values = {word.partition("=")[0]: word for word in [*words, *later]}
    if any(word.startswith("output=") for word in later):
        raise UserError("output cannot be set for a run of a sweep: it is where its table looks.")
    return list(values.values())
