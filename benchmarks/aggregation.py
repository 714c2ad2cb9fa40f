"""The masked mean against a bare MPI Allreduce of the same bytes.

    mpiexec -n 2 python benchmarks/aggregation.py [RANKS_PER_CLIENT]

Prints, per size, the median seconds of one exchange (sum over slots, division, kept values), of one
bare in-place Allreduce of the buffer, and their ratio; and of adding one client to the sum.
Exchange and reference take turns, so that both see the same machine.
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from hpcfed.app.run import quiet
from hpcfed.cluster.collectives import MaskedSum
from hpcfed.cluster.topology import connect_slots, connect_world
from hpcfed.settings.config import Cluster

MEGABYTES = (1, 4, 16, 64, 256)


def main() -> None:
    """Measure every size, with one mask for all and with masks that differ by client."""
    quiet()
    world = connect_world()
    per_client = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    topology = connect_slots(world, Cluster(ranks_per_client=per_client, threads=1))
    comm, mpi = world.comm, world.mpi

    def timed(work: Callable[..., object], *arguments: Any, **options: Any) -> float:
        comm.Barrier()
        start = time.perf_counter()
        work(*arguments, **options)
        comm.Barrier()
        return time.perf_counter() - start

    if world.rank == 0:
        library = mpi.Get_library_version().split(",")[0]
        print(f"{topology.slots} slots x {per_client} ranks, {library}, float64 on the wire")
        print(f"{'MB':>5} {'masks':>9} {'exchange s':>11} {'bare s':>9} {'ratio':>6} {'add s':>9}")
    for megabytes in MEGABYTES:
        for per_value in (False, True):
            size = megabytes * 2**20 // 8 // (1 + per_value)
            old = torch.zeros(size)
            values = torch.randn(size)
            mask = np.ones(size, dtype=bool) if per_value else None
            exchanges, references, adds = [], [], []
            for repeat in range(3 + max(5, 256 // megabytes)):
                total = MaskedSum(size, per_value_weights=per_value)
                bare = np.ones(megabytes * 2**20 // 8)  # as fresh as the other
                add = timed(total.add, values, 3, mask)
                exchange = timed(total.mean, old, topology)
                reference = timed(topology.across.Allreduce, mpi.IN_PLACE, bare, op=mpi.SUM)
                if repeat >= 3:
                    exchanges.append(exchange)
                    references.append(reference)
                    adds.append(add)
            if world.rank == 0:
                took, base, add = (statistics.median(x) for x in (exchanges, references, adds))
                kind = "by value" if per_value else "one"
                print(f"{megabytes:>5} {kind:>9} {took:>11.5f} {base:>9.5f} {took / base:>6.2f} "
                      f"{add:>9.5f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
