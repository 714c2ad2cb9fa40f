"""From DeepSpeed's own launcher to an MPI world.

`deepspeed --num_nodes 2` starts its processes over ssh, each an MPI world of its own, in which
nothing would ever be aggregated. So the processes meet at MASTER_ADDR:MASTER_PORT; the first starts
mpiexec over the hosts and numbers of processes that DeepSpeed chose; the others wait without
touching a device, hand signals on, and end with mpiexec's exit code.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from datetime import timedelta
from types import FrameType
from typing import Any

from hpcfed.cluster import launcher
from hpcfed.cluster.network import make_store
from hpcfed.cluster.stop import heard
from hpcfed.cluster.topology import Launched, check_hosts, forget_launcher
from hpcfed.errors import UserError
from hpcfed.settings.config import Cluster

POLL_SECONDS = 0.2
FAREWELL_SECONDS = 10.0

# Loads the MPI library but starts no MPI.
_PROBE = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI"


def take_part(process: Launched, cluster: Cluster, arguments: list[str]) -> int:
    """Run `hpcfed ARGUMENTS` on one MPI rank for each of DeepSpeed's processes; its exit code.

    Raises UserError, on the processes that see it, if they do not find each other in time, if a
    host has no MPI, or if the hosts cannot hold the clients.
    """
    store = _meet(process, cluster.meet_seconds)
    store.set(f"process-{process.rank}", json.dumps(_about(process)))
    if process.rank > 0:
        return _follow(store, process)
    return _lead(store, process, cluster, arguments)


def _meet(process: Launched, seconds: float) -> Any:
    where = f"{process.address}:{process.port}"
    first = process.rank == 0
    try:
        return make_store(
            process.address, process.port, process.size, first, timedelta(seconds=seconds)
        )
    except (RuntimeError, ValueError, OSError) as error:  # torch's own derive from RuntimeError
        reason = str(error).splitlines()[0]
        if first:
            raise UserError(
                f"The first process cannot listen at {where} ({reason}); another job may use the "
                "port: give deepspeed another --master_port."
            ) from None
        raise UserError(
            f"Process {process.rank} on {socket.gethostname()} cannot reach the first one at "
            f"{where} ({reason}); see to it that the hosts reach each other, or give deepspeed an "
            "address that they can, with --master_addr."
        ) from None


def _about(process: Launched) -> dict[str, str]:
    """What the first process must know about this one."""
    problem = ""
    if process.local_rank == 0:
        try:
            launcher.find_mpiexec()
            done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True)
            if done.returncode:
                problem = done.stderr.strip().splitlines()[-1]
        except UserError as error:
            problem = str(error)
    return {"host": socket.gethostname(), "problem": problem}


def _lead(store: Any, process: Launched, cluster: Cluster, arguments: list[str]) -> int:
    """Start mpiexec, and tell the others how it ended."""
    code = 2
    try:
        hosts = _hosts(store, process.size, cluster.meet_seconds)
        check_hosts(hosts, cluster.ranks_per_client)
        forget_launcher()
        code = _start(store, process.size, hosts, arguments)
    finally:
        store.set("end", str(code))
        until = time.monotonic() + FAREWELL_SECONDS
        while time.monotonic() < until and store.add("gone", 0) < process.size - 1:
            time.sleep(POLL_SECONDS)
    return code


def _hosts(store: Any, size: int, seconds: float) -> dict[str, int]:
    """Host -> its processes, in the order of their ranks."""
    keys = [f"process-{rank}" for rank in range(size)]
    until = time.monotonic() + seconds
    for rank, key in enumerate(keys):
        left = max(1.0, until - time.monotonic())
        try:
            store.wait([key], timedelta(seconds=left))
        except RuntimeError:
            raise UserError(
                f"Process {rank} of {size} was not heard of within {seconds:.0f} s "
                "(cluster.meet_seconds); see to it that all hosts reach the first one, and look "
                "above for what it may have said."
            ) from None
    known = [json.loads(store.get(key)) for key in keys]
    for about in known:
        if about["problem"]:
            raise UserError(
                f"No MPI on {about['host']} ({about['problem']}); install or load the same MPI on "
                "all hosts."
            )
    return dict(Counter(about["host"] for about in known))


def _start(store: Any, size: int, hosts: dict[str, int], arguments: list[str]) -> int:
    program = [sys.executable, "-m", "hpcfed", *arguments]
    command, extra = launcher.command(launcher.find_mpiexec(), size, program, hosts)
    mpiexec = subprocess.Popen(command, env={**os.environ, **extra})
    with mpiexec, launcher.forwarding(mpiexec):
        passed = False
        while mpiexec.poll() is None:
            time.sleep(POLL_SECONDS)
            if not passed and store.check(["signal"]):
                passed = True
                mpiexec.send_signal(signal.SIGUSR1)
        return mpiexec.returncode


def _follow(store: Any, process: Launched) -> int:
    """Wait for the end; tell the first process of signals."""
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    for number in heard():
        signal.signal(number, note)
    told = False
    try:
        while not store.check(["end"]):
            time.sleep(POLL_SECONDS)
            if asked and not told:
                told = True
                store.set("signal", str(asked[0]))
        code = int(store.get("end"))
        store.add("gone", 1)
    except RuntimeError:
        raise UserError(
            f"Process {process.rank} on {socket.gethostname()} has lost the first one; its own "
            "last words say why."
        ) from None
    return code
