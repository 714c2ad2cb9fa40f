"""Runs as jobs, each with an MPI world of its own, and what has become of them.

submitit starts them: on Slurm as a job array, each job of so many nodes and tasks; `local` and
`debug` by the same call on this machine, where a job is one process that starts mpiexec. What a run
has got to is read from its run directory, so any process may ask, at any time.
"""

import argparse
import fcntl
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcfed.app.run import run_command
from hpcfed.cluster import launcher
from hpcfed.errors import UserError
from hpcfed.storage.checks import DamageError, read_object
from hpcfed.storage.files import holder, write_json
from hpcfed.storage.paths import LOCK, MANIFEST, SUMMARY

LOG_LINES = 8
LOGS, JOBS = "logs", "jobs.json"
TURN = "turn"  # whose lock says whose turn it is, and which names that job
_GPUS, _OWN_ID = "CUDA_VISIBLE_DEVICES", "SUBMITIT_LOCAL_JOB_ID"

EXECUTORS = ("slurm", "local", "debug")
# What a cluster is told, with defaults; what begins with slurm_ is submitit's own and goes to it as
# it is.
CLUSTER = {"nodes": 1, "tasks_per_node": 1, "cpus_per_task": 1, "timeout_min": 60}


@dataclass(frozen=True)
class Job:
    """What submitit runs: on Slurm in each task of the job, which is one MPI rank; elsewhere once,
    to start the ranks."""

    words: tuple[str, ...]  # the source and overrides
    ranks: int  # 0: this process is a rank already
    turn: str = ""  # a file whose lock says whose turn it is, where jobs take turns
    gpus: str | None = None  # those that a job on this machine sees; None: all

    def __call__(self) -> None:
        if self.ranks == 0:
            options = argparse.Namespace(
                source=self.words[0], overrides=list(self.words[1:]), ranks=None, resume=True,
                live=False,
            )  # fmt: skip
            code = run_command(options, listen=False)
        elif self.turn:
            with open(self.turn, "a+") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX)
                stream.truncate(0)
                print(os.environ.get(_OWN_ID, ""), file=stream, flush=True)
                code = self._start()
        else:
            code = self._start()
        if code:
            raise RuntimeError(f"hpcfed run {' '.join(self.words)} ended with code {code}")

    def _start(self) -> int:
        """Run it on ranks of this machine; their exit code."""
        # submitit hides the GPUs from jobs on this machine that ask for none.
        os.environ.pop(_GPUS, None)
        if self.gpus is not None:
            os.environ[_GPUS] = self.gpus
        return launcher.start(self.ranks, ["run", *self.words, "--resume", "--no-live"])

    def checkpoint(self) -> Any:
        """Called in task 0's signal handler, where nothing can be agreed on with other ranks: the
        next life goes on from the last committed round."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


@dataclass
class Status:
    """What has become of a run. state: complete; running; pending, in Slurm's queue; waiting, for
    its turn on this machine; failed; new; and of runs that were not submitted here stopped, where
    their process has ended, or begun, where that cannot be seen."""

    name: str
    state: str
    job: str = ""
    rounds: int = 0
    log: list[str] = field(default_factory=list)  # of a failed run, the last lines

    @property
    def over(self) -> bool:
        """Whether nothing more comes of it unless it is submitted."""
        return self.state not in ("pending", "waiting", "running")


class Jobs:
    """The jobs of a folder: a run directory for each run, logs, and jobs.json.

    runs: name -> the words after `hpcfed run`; more may come. cluster: CLUSTER, and submitit's own.
    takes_turns: on this machine one runs at a time, however many are submitted.
    """

    def __init__(
        self,
        folder: Path,
        executor: str,
        cluster: Mapping[str, Any],
        runs: dict[str, tuple[str, ...]],
        takes_turns: bool = True,
    ) -> None:
        self.folder, self.executor, self.runs = folder, executor, runs
        self._cluster = {**CLUSTER, **cluster}
        self._takes_turns = takes_turns

    @property
    def tasks(self) -> int:
        """MPI ranks of a job."""
        nodes, tasks = self._cluster["nodes"], self._cluster["tasks_per_node"]
        return int(nodes) * int(tasks)

    def submit(self, names: Sequence[str]) -> None:
        """Start them, or put them into the queue."""
        if not names:
            return
        executor = self.make_executor()
        with executor.batch():
            started = [executor.submit(self._job(name)) for name in names]
        known = self.known()
        for name, job in zip(names, started, strict=True):
            known[name] = {"job": job.job_id, "executor": self.executor, "tasks": self.tasks}
        write_json(self.folder / JOBS, known)
        if self.executor == "debug":
            for job in started:
                job.exception()  # runs it, here and now

    def status(self, names: Sequence[str] | None = None) -> list[Status]:
        """What has become of each run."""
        known = self.known()
        return [status_of(self.folder, name, known.get(name)) for name in names or self.runs]

    def known(self) -> dict[str, dict[str, Any]]:
        """Run -> its latest job."""
        return known_jobs(self.folder)

    def _job(self, name: str) -> Job:
        if self.executor == "slurm":
            return Job(self.runs[name], 0)
        turn = str((self.folder / TURN).absolute()) if self._takes_turns else ""
        return Job(self.runs[name], self.tasks, turn, os.environ.get(_GPUS))

    def make_executor(self) -> Any:
        """submitit's, told all that it has to know."""
        import submitit

        if self.executor != "slurm":
            launcher.check_number(self.tasks, "cluster.nodes x cluster.tasks_per_node", "")
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


def known_jobs(folder: Path) -> dict[str, dict[str, Any]]:
    """Run -> its latest job, of a folder of runs. Raises UserError if jobs.json is damaged."""
    file = folder / JOBS
    if not file.is_file():
        return {}
    try:
        jobs = read_object(file)
        if all({"job", "executor"} <= set(own) for own in jobs.values()):
            return jobs
    except (DamageError, TypeError):
        pass
    raise UserError(
        f"{file} is damaged, and with it which job runs what; remove it once no job of it runs."
    )


def status_of(folder: Path, name: str, job: Mapping[str, Any] | None) -> Status:
    """What has become of the run folder/name. job: its entry in jobs.json."""
    manifest, number = folder / name / MANIFEST, job["job"] if job else ""
    rounds = _object(manifest).get("rounds", 0)
    if _object(folder / name / SUMMARY):
        return Status(name, "complete", number, rounds)
    lives, _ = holder(folder / name / LOCK)
    if lives:  # whoever has started it
        return Status(name, "running", number, rounds)
    if job is None:  # by hand, or by an array of one's own, if it has begun
        begun = "stopped" if lives is False else "begun"
        return Status(name, begun if manifest.is_file() else "new", "", rounds)
    state = _job_state(folder, job)
    status = Status(name, state, job["job"], rounds)
    if state == "failed":
        status.log = _last_words(folder / LOGS, job["job"])
    return status


def _job_state(folder: Path, job: Mapping[str, Any]) -> str:
    """running, pending, waiting, or failed: it has ended, and left no result."""
    if job["executor"] == "slurm":
        import submitit

        tasks = list(range(job["tasks"]))
        slurm: Any = submitit.SlurmJob(folder / LOGS, job["job"], tasks=tasks)
        state = slurm.watcher.get_state(slurm.job_id, mode="force").upper()
        if state.startswith(("PENDING", "REQUEUED", "UNKNOWN", "SUSPENDED", "PREEMPTED")):
            return "pending"
        return "running" if state.startswith(("RUNNING", "COMPLETING")) else "failed"
    # A local job is called like its process.
    try:
        alive = b"submitit" in Path(f"/proc/{job['job']}/cmdline").read_bytes()
    except OSError:
        alive = False
    if not alive:
        return "failed"
    turn = folder / TURN
    waits = turn.is_file() and turn.read_text().strip() != job["job"]
    return "waiting" if waits else "running"


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
