"""Program: a rank of an MPI world that runs what it is told, one case after the other.

usage: world.py SOCKET RANKS_PER_CLIENT|bare     started by tests.worlds, itself or by tests.forks

Each rank waits on a connection of its own, so an idle world takes no time from others.
"""

import faulthandler
import gc
import importlib
import os
import signal
import sys
import traceback
from multiprocessing.connection import Client
from typing import Any

from hpcfed.app.run import quiet

# What a first case would import.
LATER = (
    "torch", "deepspeed", "peft", "hpcfed.rounds.federation",
    "transformers.models.bert.modeling_bert", "tests.mpi.cases.engine", "tests.mpi.cases.runs",
    "deepspeed.runtime.zero.utils", "torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer",
)  # fmt: skip


def load() -> None:
    """Import it; what is forked from this process has it."""
    gc.disable()
    for name in LATER:
        importlib.import_module(name)
    gc.enable()
    freeze()


def freeze() -> None:
    """Leave what is imported out of later collections: DeepSpeed collects garbage whenever it makes
    a ZeRO-3 engine, some cases after each life of a run, and among all that has been imported that
    takes longer than the engine."""
    gc.collect()
    gc.freeze()


def prepare(world: Any, ranks_per_client: int) -> Any:
    """The world's slots, with all that cases need loaded."""
    from hpcfed.cluster.topology import connect_slots
    from hpcfed.settings.config import Cluster

    topology = connect_slots(world, Cluster(ranks_per_client=ranks_per_client, threads=1))
    if "peft" not in sys.modules:
        load()
    return topology


def serve(address: str, ranks_per_client: str) -> None:
    """Run cases until told to end."""
    quiet()
    # What hangs is asked where, before it is killed.
    faulthandler.register(signal.SIGQUIT, all_threads=True)
    from hpcfed.cluster.topology import connect_world

    world = connect_world()
    topology = world if ranks_per_client == "bare" else prepare(world, int(ranks_per_client))
    known = 0  # modules
    with Client(address, family="AF_UNIX") as line:
        line.send((world.rank, os.getpid()))
        while (request := line.recv()) is not None:
            name, arguments = request
            module, _, function = name.partition(":")
            try:
                case = getattr(importlib.import_module(module), function)
                reply = (True, case(topology, **arguments))
            except BaseException:
                reply = (False, traceback.format_exc())
            sys.stdout.flush()
            line.send(reply)
            if len(sys.modules) != known:
                known = len(sys.modules)
                freeze()
    world.comm.Barrier()


if __name__ == "__main__":
    serve(*sys.argv[1:])
