"""Nobody waits for ever: what each rank is doing, and the end of a job in which nothing moves.

MPI waits without limit for a rank that hangs. So each rank says what it is doing (`doing`), and its
communicators say when it waits for others (`watched`). A thread publishes that in a store that rank
0 keeps, and where this rank has waited for cluster.timeout_minutes while no rank that is not
waiting got on, the job ends, and one rank says who is missing. What is committed can be resumed.

The same thread ends a rank whose launcher is gone: nobody else would.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

# Calls on a communicator that return only when other ranks have made them too.
_WAITS = frozenset(
    (
        "Allgather", "Allgatherv", "Allreduce", "Alltoallv", "Barrier", "Bcast", "Split",
        "Split_type", "allgather", "allreduce", "bcast",
    )
)  # fmt: skip

_ENDED = 1  # exit code


class Watched:
    """A communicator of mpi4py whose waits are known to the watch."""

    def __init__(self, comm: Any, watch: "Watch") -> None:
        self._comm, self._watch = comm, watch

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._comm, name)
        if name not in _WAITS:
            return found

        def wait(*args: Any, **kwargs: Any) -> Any:
            self._watch.waits(True)
            try:
                return found(*args, **kwargs)
            finally:
                self._watch.waits(False)

        self.__dict__[name] = wait  # the next call finds it at once
        return wait


State = tuple[str, bool, int]  # what a rank does, whether it waits for others, moves so far


class Stillness:
    """For how long nothing has moved, by what was seen. Clocks in seconds."""

    def __init__(self, limit: float, state: State, clock: float) -> None:
        self._limit = limit
        self._mine, self._since = state, clock
        # The others that do not wait, as last seen, and since when they are seen so.
        self._others: dict[int, str] | None = None
        self._unmoved = clock

    def moved(self, state: State, clock: float) -> bool:
        """Whether this rank's state is another than before."""
        if state == self._mine:
            return False
        self._mine, self._since, self._others = state, clock, None
        return True

    def suspicious(self, clock: float) -> bool:
        """Whether it is time to look at the others: half of the limit has passed."""
        return clock - self._since >= self._limit / 2

    def over(self, others: dict[int, str], clock: float) -> bool:
        """Whether this rank has not moved for the limit, and the others that do not wait, now in
        these states, not for half of it."""
        if others != self._others:
            self._others, self._unmoved = others, clock
        still = clock - self._unmoved >= self._limit / 2
        return still and clock - self._since >= self._limit


class Watch:
    """What this rank does, and the thread that looks whether anything moves."""

    def __init__(self, rank: int, ranks: int) -> None:
        self._rank, self._ranks = rank, ranks
        self._what, self._moves, self._waiting = "starting", 0, False
        self._minutes, self._strict = 0.0, False
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()

    def doing(self, what: str) -> None:
        """What this rank does from now on, as "training client 3 in round 2"."""
        self._what = what
        self._moves += 1

    def moves(self) -> None:
        """It got on with it."""
        self._moves += 1

    def waits(self, waiting: bool) -> None:
        """It waits for other ranks, or no longer."""
        self._waiting = waiting
        self._moves += 1

    @property
    def what(self) -> str:
        """What this rank does."""
        return self._what

    def start(self, minutes: float, connect: Callable[[], Any]) -> None:
        """Look from now on. minutes: without a move until the job ends. connect: gives the store,
        in the thread that uses it."""
        self.stop()
        self._minutes = minutes
        self._stopped = threading.Event()
        arguments = (self._stopped, minutes * 60, connect)
        self._thread = threading.Thread(target=self._look, args=arguments, daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def strictly(self) -> Iterator[None]:
        """Meanwhile this rank says at every step that it moves: no move means that it hangs, also
        where it does not wait for others."""
        self._strict = True
        try:
            yield
        finally:
            self._strict = False

    def stop(self) -> None:
        """Look no more."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _state(self) -> State:
        return self._what, self._waiting, self._moves

    def _look(self, stopped: threading.Event, limit: float, connect: Callable[[], Any]) -> None:
        store = connect() if self._ranks > 1 else None
        parent = os.getppid()
        state = self._state()
        stillness = Stillness(limit, state, time.monotonic())
        self._publish(store, state)
        while not stopped.wait(min(1.0, limit / 20)):
            if os.getppid() != parent:
                _say(f"rank {self._rank}: its launcher is gone, and it ends too")
                os._exit(_ENDED)
            state, clock = self._state(), time.monotonic()
            if stillness.moved(state, clock):
                self._publish(store, state)
            elif store is not None and (state[1] or self._strict) and stillness.suspicious(clock):
                others = self._others(store)
                if stillness.over(others, clock):
                    self._end(store, others)

    def _publish(self, store: Any, state: State) -> None:
        if store is None:
            return
        what, waiting, moves = state
        text = json.dumps([what, waiting, moves, socket.gethostname()])
        try:
            store.set(f"rank{self._rank}", text)
        except RuntimeError:  # rank 0 is gone, or hangs: seen by those that wait
            return

    def _others(self, store: Any) -> dict[int, str]:
        """The published states of the ranks that do not wait; a rank that cannot be asked is one
        too."""
        states = {}
        try:
            for rank in range(self._ranks):
                key = f"rank{rank}"
                text = store.get(key).decode() if store.check([key]) else ""
                if not text or not json.loads(text)[1]:
                    states[rank] = text
        except RuntimeError:
            return {0: ""}
        return states

    def _end(self, store: Any, missing: dict[int, str]) -> None:
        """The end of this rank, and by its launcher that of the job; one rank says why."""
        try:
            speaks = store.compare_set("speaker", "", str(self._rank)).decode() == str(self._rank)
        except RuntimeError:
            speaks = True
        if speaks:
            who = "; ".join(_described(rank, text) for rank, text in missing.items())
            who = who or f"all ranks wait, rank {self._rank} while {self._what}"
            _say(
                f"nothing has moved for {self._minutes:g} minutes (cluster.timeout_minutes): {who}."
                " The job ends; what is committed is kept: go on with --resume"
            )
        else:
            time.sleep(2.0)  # the one that speaks comes first
        os._exit(_ENDED)


def _described(rank: int, text: str) -> str:
    if not text:
        return f"rank {rank} does not answer"
    what, _, _, host = json.loads(text)
    return f"rank {rank} on {host} is missing, last seen {what}"


def _say(what: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"hpcfed: {what}.\n".encode())


def patience(minutes: float) -> timedelta:
    """How long the store is waited for: within the deadline, so that it can be said."""
    return timedelta(seconds=max(1.0, min(30.0, minutes * 60 / 4)))
