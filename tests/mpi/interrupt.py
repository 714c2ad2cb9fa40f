"""Program: `hpcfed ARGUMENTS` on this rank, with a signal to itself at a chosen instant.

usage: interrupt.py EVENT COUNT RANK SIGNAL ARGUMENTS...

The signal comes right before the event's COUNT-th time (from 1) on this rank of the world.
"""

import os
import signal
import sys

import hpcfed.federation
import hpcfed.files
import hpcfed.run
from hpcfed.client import Client
from hpcfed.collectives import MaskedSum
from hpcfed.run import RunDirectory
from hpcfed.states import ClientStates

EVENTS = {
    "forward": (Client, "forward"),
    "select": (hpcfed.federation, "select"),
    "state": (RunDirectory, "save_state"),
    "exchange": (MaskedSum, "mean"),
    "commit": (RunDirectory, "commit"),
    "tensors": (hpcfed.run, "write_tensors"),
    "manifest": (hpcfed.run, "write_json"),
    "sweep": (ClientStates, "sweep"),
    "adapter": (RunDirectory, "save_adapter"),
    "predictions": (RunDirectory, "save_predictions"),
    "summary": (RunDirectory, "save_summary"),
}


def arm(event: str, count: int, rank: int, name: str) -> None:
    """Count the event; strike."""
    holder, attribute = EVENTS[event]
    original = getattr(holder, attribute)
    left = [count]

    def counting(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            from mpi4py import MPI

            if rank == MPI.COMM_WORLD.rank:
                os.kill(os.getpid(), signal.Signals[name])
        return original(*args, **kwargs)

    setattr(holder, attribute, counting)


if __name__ == "__main__":
    arm(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    from hpcfed.cli import main

    sys.exit(main(sys.argv[5:]))
