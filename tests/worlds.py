"""Persistent MPI worlds: real mpiexec, started once for each shape, that take cases one by one.

    worlds.call((2, 1), "tests.mpi.cases.engine:check", folder=..., ...)

runs `check(topology, folder=...)` on all ranks of a world of 2 slots of 1 rank, and returns what
each rank returned. Starting a world takes longer than most cases. A world in which a case failed,
or did not end, is killed and replaced, and the case runs again, alone in the new world, before it
is called a failure; if it then passes, a warning says what had run before. HPCFED_FRESH_WORLDS=1
gives every case a world of its own, so that state that leaks from case to case cannot hide.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
import time
import warnings
from multiprocessing.connection import Connection, Listener, wait
from pathlib import Path
from typing import Any

from tests.fork_server import fork_server
from tests.support import ROOT, on_ranks

Shape = tuple[int, int]  # slots, ranks per client

START_SECONDS = 600.0  # the first one on a machine compiles an operator
CASE_SECONDS = 400.0  # a case that takes longer hangs
AFTER_FAILURE = 10.0  # what other ranks get, once one has failed, to fail too or to end


class WorldError(Exception):
    """A case failed on some rank, or did not end."""


class World:
    """One running world."""

    def __init__(self, shape: Shape, forked: bool, bare: bool) -> None:
        """forked: its ranks come from the fork server. bare: they know nothing but MPI."""
        self.cases: list[str] = []
        slots, ranks_per_client = shape
        self._ranks = slots * ranks_per_client
        self._folder = Path(tempfile.mkdtemp(prefix="world-"))
        self._lines: list[Connection | None] = [None] * self._ranks
        self._pids = [0] * self._ranks
        self._log = self._folder / "output"
        address = str(self._folder / "socket")
        words = [address, "bare" if bare else str(ranks_per_client)]
        command, environment = on_ranks(self._ranks, "world.py", *words, forked=forked)
        if self._ranks == 1:
            # Ranks that wait for each other at every step want the cores more.
            command = ["nice", *command]
        with Listener(address, family="AF_UNIX", backlog=self._ranks) as listener:
            with self._log.open("w") as log:
                self._process = subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log,
                    stderr=log, start_new_session=True,
                )  # fmt: skip
            until = time.monotonic() + START_SECONDS
            inner = listener._listener._socket  # type: ignore[attr-defined]
            for _ in range(self._ranks):
                while True:
                    if self._process.poll() is not None or time.monotonic() > until:
                        printed = self._log.read_text(errors="replace")[-6000:]
                        listener.close()
                        self.kill()
                        raise WorldError(f"the world {shape} did not start:\n{printed}")
                    inner.settimeout(1.0)
                    with contextlib.suppress(TimeoutError):
                        line = listener.accept()
                        break
                rank, self._pids[rank] = line.recv()
                self._lines[rank] = line

    def call(self, name: str, seconds: float, arguments: dict[str, Any]) -> list[Any]:
        """What each rank returned. Raises WorldError; the world is of no further use then."""
        began = self._log.stat().st_size
        self.cases.append(name)
        lines = {line: rank for rank, line in enumerate(self._lines) if line is not None}
        for own in lines:
            own.send((name, arguments))
        replies: dict[int, tuple[bool, Any]] = {}
        until = time.monotonic() + seconds
        while len(replies) < self._ranks:
            ready = wait(
                [own for own in lines if lines[own] not in replies],
                max(0.0, until - time.monotonic()),
            )
            if not ready:
                break
            for line in ready:
                assert isinstance(line, Connection)
                try:
                    replies[lines[line]] = line.recv()
                except (EOFError, OSError):
                    replies[lines[line]] = (False, "the rank has died")
                if not replies[lines[line]][0]:
                    until = min(until, time.monotonic() + AFTER_FAILURE)
        silent = [rank for rank in range(self._ranks) if rank not in replies]
        failed = {rank: text for rank, (well, text) in sorted(replies.items()) if not well}
        if not silent and not failed:
            return [replies[rank][1] for rank in range(self._ranks)]
        for rank in silent:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pids[rank], signal.SIGQUIT)
        time.sleep(0.5 if silent else 0.0)
        told = "\n".join(f"rank {rank}: {text}" for rank, text in failed.items())
        stuck = f"ranks {silent} did not end\n" if silent else ""
        with self._log.open(errors="replace") as log:
            log.seek(began)
            raise WorldError(f"{name} {arguments}\n{stuck}{told}\n{log.read()[-6000:]}")

    def close(self) -> None:
        """End it in good order."""
        with contextlib.suppress(OSError):
            for line in self._lines:
                assert line is not None
                line.send(None)
            self._process.wait(20)
        self.kill()

    def kill(self) -> None:
        """End it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for pid in filter(None, self._pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        for line in self._lines:
            if line is not None:
                line.close()
        shutil.rmtree(self._folder, ignore_errors=True)


class Worlds:
    """Worlds by shape, one at a time: that of another shape is closed when one is asked for."""

    def __init__(self, lock: Path, bare: bool = False) -> None:
        """lock: a file; of all processes that were given it, one at a time runs a world of several
        ranks, since more would only wait for each other's cores. bare: cases get no topology, but
        a World of MPI alone."""
        self._lock, self._bare = lock, bare
        self._open: dict[Shape, World] = {}
        self._fresh = os.environ.get("HPCFED_FRESH_WORLDS", "") not in ("", "0")

    def call(
        self, shape: Shape, name: str, seconds: float = CASE_SECONDS, **arguments: Any
    ) -> list[Any]:
        """Run module:function(topology, **arguments) on every rank; what each returned."""
        with self._lock.open("w") as lock:
            if shape != (1, 1):
                fcntl.flock(lock, fcntl.LOCK_EX)
            return self._call(shape, name, seconds, arguments)

    def _call(
        self, shape: Shape, name: str, seconds: float, arguments: dict[str, Any]
    ) -> list[Any]:
        world = self._get(shape)
        before = list(world.cases)
        try:
            return world.call(name, seconds, arguments)
        except WorldError as first:
            self._drop(shape)
            if not before:
                raise
            problem = first
        try:
            result = self._get(shape).call(name, seconds, arguments)
        except WorldError:
            self._drop(shape)
            raise
        warnings.warn(
            f"passed only alone in a fresh world; before it came {before}:\n{problem}", stacklevel=2
        )
        return result

    def _get(self, shape: Shape) -> World:
        if shape not in self._open or self._fresh:
            self.close()
            forked = not self._bare and fork_server() is not None
            self._open[shape] = World(shape, forked, self._bare)
        return self._open[shape]

    def _drop(self, shape: Shape) -> None:
        self._open.pop(shape).kill()

    def close(self) -> None:
        """End what is open."""
        for world in self._open.values():
            world.close()
        self._open.clear()
