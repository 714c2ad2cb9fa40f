"""Program: `hpcfed ARGUMENTS` on this rank, with a signal to itself at a chosen instant.

usage: interrupt.py EVENT COUNT RANK SIGNAL ARGUMENTS...

The signal comes right before the event's COUNT-th time (from 1) on this rank of the world; instead
of a signal, ENOSPC is the error of a full disk. The clock by which a run decides whether a round
still fits stands still.
"""

import errno
import os
import signal
import sys
from functools import partial
from typing import Any

import hpcfed.app.run
import hpcfed.cluster.stop
import hpcfed.rounds.federation
import hpcfed.storage.files
import hpcfed.storage.run
from hpcfed.app import cli, run
from hpcfed.cluster.collectives import MaskedSum
from hpcfed.engine.engine import Engine
from hpcfed.storage.run import RunDirectory
from hpcfed.storage.states import ClientStates

# What a run does, besides writing files, that a later life may find half done.
EVENTS: dict[str, tuple[Any, str]] = {
    "forward": (Engine, "forward"),
    "select": (hpcfed.rounds.federation, "select"),
    "exchange": (MaskedSum, "mean"),
    "commit": (RunDirectory, "commit"),
    "sweep": (ClientStates, "sweep"),
}
WRITES = {
    "manifest": (hpcfed.storage.run, "seal"),
    "write": (hpcfed.storage.files, "sync_folder"),
}


def arm(event: str, count: int, rank: int, name: str) -> tuple[Any, str, Any]:
    """What to put in the event's place, so that it is counted, and strikes: holder, attribute, and
    the function."""
    holder, attribute = {**EVENTS, **WRITES}[event]
    original = getattr(holder, attribute)
    left = [count]

    def counting(*args: Any, **kwargs: Any) -> Any:
        if event == "forward" and args[0].failures.silenced:  # the trial step's
            return original(*args, **kwargs)
        left[0] -= 1
        if left[0] == 0:
            from mpi4py import MPI

            if rank == MPI.COMM_WORLD.rank and name == "ENOSPC":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if rank == MPI.COMM_WORLD.rank:
                os.kill(os.getpid(), signal.Signals[name])
        return original(*args, **kwargs)

    return holder, attribute, counting


# The clock that stands still.
Still = partial(hpcfed.cluster.stop.Stop, clock=lambda: 0.0)

if __name__ == "__main__":
    setattr(*arm(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))
    run.Stop = Still  # type: ignore[attr-defined, assignment]
    sys.exit(cli.main(sys.argv[5:]))
