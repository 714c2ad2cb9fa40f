"""Many runs from one description: each a job with an MPI world of its own.

    sweep = Sweep.load("launch/experiments/small.yaml")
    sweep.submit()          # again: only what failed or was never submitted
    sweep.wait()
    print(sweep.table())

submitit starts them: on Slurm as a job array, each job of so many nodes and tasks; `local` and
`debug` by the same call on this machine, where a job is one process that starts mpiexec. What a run
has got to is read from its run directory, so any process may ask, at any time.
"""

import argparse
import fcntl
import itertools
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcfed.app.run import run_command
from hpcfed.app.sweep_file import CLUSTER, asks_for_gpus, checked
from hpcfed.cluster import launcher
from hpcfed.errors import UserError
from hpcfed.rounds.preflight import check_options
from hpcfed.settings.reading import given_once, read_file
from hpcfed.settings.resolve import Resolved, as_text, leaves, resolve
from hpcfed.storage.checks import DamageError, read_object
from hpcfed.storage.files import write_json
from hpcfed.storage.paths import MANIFEST, SUMMARY

POLL_SECONDS = 2.0
LOG_LINES = 8

LOGS, JOBS = "logs", "jobs.json"


@dataclass(frozen=True)
class Job:
    """What submitit runs: on Slurm in each task of the job, which is one MPI rank; elsewhere once,
    to start the ranks."""

    words: tuple[str, ...]  # the source and overrides
    ranks: int  # 0: this process is a rank already
    turn: str = ""  # a file whose lock says whose turn it is, where jobs share a machine

    def __call__(self) -> None:
        if self.ranks == 0:
            options = argparse.Namespace(
                source=self.words[0], overrides=list(self.words[1:]), ranks=None, resume=True,
                live=False,
            )  # fmt: skip
            code = run_command(options, listen=False)
        else:
            with open(self.turn, "w") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX)
                words = ["run", *self.words, "--resume", "--no-live"]
                code = launcher.start(self.ranks, words)
        if code:
            raise RuntimeError(f"hpcfed run {' '.join(self.words)} ended with code {code}")

    def checkpoint(self) -> Any:
        """Called in task 0's signal handler, where nothing can be agreed on with other ranks: the
        next life goes on from the last committed round."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


@dataclass
class Status:
    """What has become of a run. state: complete, running, pending, failed, new; or begun: by a job
    that this sweep did not submit, and whose end it cannot see."""

    name: str
    state: str
    job: str = ""
    rounds: int = 0
    log: list[str] = field(default_factory=list)  # of a failed run, the last lines


class Sweep:
    """A description, its runs, and the folder that holds them.

    runs: name -> the overrides of `source`. A run's directory is folder/name.
    """

    def __init__(self, description: Mapping[str, Any], name: str = "the sweep") -> None:
        """Raises UserError for whatever a run would be refused for before it reads data."""
        spec = checked(description, name)
        self.source: str = spec["source"]
        self.folder = Path(spec["folder"])
        self.executor: str = spec["executor"]
        self._cluster: dict[str, Any] = {**CLUSTER, **spec["cluster"]}
        self.nodes: int = self._cluster["nodes"]
        self.tasks_per_node: int = self._cluster["tasks_per_node"]
        fixed = {"cluster.device": "cuda"} if asks_for_gpus(spec) else {}
        fixed |= dict(leaves(spec["overrides"]))
        self.varied = dict(_varied(spec))
        self.runs = {
            run: _words({**fixed, **dict(leaves(values)), "output": str(self.folder / run)})
            for run, values in self.varied.items()
        }
        for run in self.runs:
            try:
                check_options(self.resolved(run), self._tasks())
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
        if not wanted:
            return []
        executor = self._make_executor()
        with executor.batch():
            started = [executor.submit(self._job(name)) for name in wanted]
        known = self._known()
        for name, job in zip(wanted, started, strict=True):
            known[name] = {"job": job.job_id, "executor": self.executor}
        write_json(self.folder / JOBS, known)
        if self.executor == "debug":
            for job in started:
                job.exception()  # runs it, here and now
        return wanted

    def status(self) -> list[Status]:
        """What has become of each run."""
        known = self._known()
        return [self._status(name, known.get(name)) for name in self.runs]

    def wait(self) -> list[Status]:
        """Until no run is pending or running; what has become of each."""
        while True:
            runs = self.status()
            if all(run.state not in ("pending", "running") for run in runs):
                return runs
            time.sleep(POLL_SECONDS)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each run: what is varied, its state and, once it is complete, its result."""
        rows = []
        for run in self.status():
            row = {"run": run.name, **self.varied[run.name], "state": run.state}
            if run.state == "complete":
                result = read_object(self.folder / run.name / SUMMARY)
                scores = result["accuracy"] if "accuracy" in result else result["score"]
                row |= {
                    "personal": scores["personal"],
                    "global": scores["global"],
                    "best round": result["best"]["round"] if result["best"] else None,
                    "samples": result["samples"],
                    "MB up": result["bytes"]["up"] / 1e6,
                    "seconds": result["seconds"]["total"],
                }
            rows.append(row)
        return rows

    def table(self) -> str:
        """`rows` as a Markdown table."""
        rows = self.rows()
        names = list(dict.fromkeys(name for row in rows for name in row))
        cells = [names, *([_shown(row.get(name)) for name in names] for row in rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
        lines = [
            "| " + " | ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)) + " |"
            for row in cells
        ]
        return "\n".join(
            [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]
        )

    def _status(self, name: str, job: dict[str, str] | None) -> Status:
        folder = self.folder / name
        manifest = folder / MANIFEST
        rounds = _object(manifest).get("rounds", 0)
        if _object(folder / SUMMARY):
            return Status(name, "complete", job["job"] if job else "", rounds)
        if job is None:  # by an array of one's own, if it has begun
            return Status(name, "begun" if manifest.is_file() else "new", "", rounds)
        state = _job_state(self.folder / LOGS, job, self._tasks())
        status = Status(name, state, job["job"], rounds)
        if state == "failed":
            status.log = _last_words(self.folder / LOGS, job["job"])
        return status

    def _known(self) -> dict[str, dict[str, str]]:
        """Run -> its latest job."""
        file = self.folder / JOBS
        return json.loads(file.read_text()) if file.is_file() else {}

    def _tasks(self) -> int:
        return self.nodes * self.tasks_per_node

    def _job(self, name: str) -> Job:
        words = (self.source, *self.runs[name])
        if self.executor == "slurm":
            return Job(words, 0)
        return Job(words, self._tasks(), str((self.folder / "turn").absolute()))

    def _make_executor(self) -> Any:
        import submitit

        if self.executor != "slurm":
            launcher.check_number(self._tasks(), "cluster.nodes x cluster.tasks_per_node", "")
        try:
            executor = submitit.AutoExecutor(self.folder / LOGS, cluster=self.executor)
        except RuntimeError:
            raise UserError(
                "There is no srun here, and so no Slurm: submit where sbatch works, or run on this "
                "machine with --executor local."
            ) from None
        given = dict(self._cluster)
        if self.executor == "slurm":
            # How ranks find each other.
            arguments = given.get("slurm_srun_args", [])
            if not any(str(word).startswith("--mpi") for word in arguments):
                given["slurm_srun_args"] = [f"--mpi={mpi_type()}", *arguments]
            given.setdefault("slurm_job_name", self.folder.name)
        else:
            # One process a job, which starts all ranks; it waits for its turn, and that counts.
            minutes = given["timeout_min"] * len(self.runs)
            given = {"timeout_min": minutes}
        executor.update_parameters(**given)
        return executor


def mpi_type() -> str:
    """What srun is given as --mpi: the variable MPI_TYPE, as for the scripts in slurm/."""
    name = os.environ.get("MPI_TYPE") or "pmix"
    if not re.fullmatch(r"\w+", name):
        raise UserError(f"MPI_TYPE is {name!r}; it must be a name that `srun --mpi=list` shows.")
    return name


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


def _job_state(logs: Path, job: Mapping[str, str], tasks: int) -> str:
    """running, pending, or failed: it has ended, and left no result."""
    if job["executor"] == "slurm":
        import submitit

        slurm: Any = submitit.SlurmJob(logs, job["job"], tasks=list(range(tasks)))
        state = slurm.watcher.get_state(slurm.job_id, mode="force").upper()
        if state.startswith(("PENDING", "REQUEUED", "UNKNOWN", "SUSPENDED", "PREEMPTED")):
            return "pending"
        return "running" if state.startswith(("RUNNING", "COMPLETING")) else "failed"
    # A local job is called like its process.
    try:
        alive = b"submitit" in Path(f"/proc/{job['job']}/cmdline").read_bytes()
    except OSError:
        alive = False
    return "running" if alive else "failed"


def _last_words(logs: Path, job: str) -> list[str]:
    """The last lines that a job's tasks wrote before submitit reports its end."""
    output: list[str] = []
    for file in sorted(logs.glob(f"{job}*_log.err")):
        lines = [w for w in file.read_text(errors="replace").splitlines() if w.strip()]
        end = next((i for i, w in enumerate(lines) if w.startswith("submitit ERROR")), len(lines))
        output += [w for w in lines[:end] if not w.startswith("submitit ")]
    said = [w for w in output if w.startswith("hpcfed: ")]
    return said[-1:] or output[-LOG_LINES:]


def _object(file: Path) -> dict[str, Any]:
    """What a file of a run holds; nothing if it is not there, or damaged."""
    try:
        return read_object(file)
    except DamageError:
        return {}


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
