"""Program: run several configurations in one MPI world; rank 0 saves each run's final values.

usage: train_variants.py OUT RANKS_PER_CLIENT NAME:STAGE...   (NAME from variants.VARIANTS)
"""

import sys
import time
from pathlib import Path

import numpy as np

from hpcfed.cli import quiet
from hpcfed.federation import Federation
from hpcfed.progress import Progress
from hpcfed.resolve import resolve
from hpcfed.topology import connect_slots, connect_world
from tests.mpi.variants import overrides


def main() -> None:
    """Run all variants on the same slots."""
    quiet()
    out, ranks_per_client, *runs = sys.argv[1:]
    world = connect_world()
    topology = None
    for run in runs:
        name, stage = run.split(":")
        extra = [f"cluster.ranks_per_client={ranks_per_client}", f"output={out}/run-{name}-{stage}"]
        resolved = resolve("lora-fedavg", overrides(out, name, stage) + extra)
        topology = topology or connect_slots(world, resolved.config.cluster)
        began = time.monotonic()
        federation = Federation(resolved, world, began, topology)
        federation.run(Progress(speaks=False))
        if world.rank == 0:
            np.save(Path(out) / f"{name}-{stage}.npy", federation.shared.numpy())
            print(f"{name}-{stage} {time.monotonic() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()
