"""Program: several runs in one MPI world, one after the other; starting a world costs seconds.

usage: many_runs.py RUNS.json     a list of {"name", "overrides"}; all with the same ranks per
client. Rank 0 saves each run's final shared values beside the file, as NAME.npy.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

from hpcfed.cli import quiet
from hpcfed.federation import Federation
from hpcfed.preflight import check
from hpcfed.progress import Progress
from hpcfed.resolve import resolve
from hpcfed.topology import connect_slots, connect_world


def main() -> None:
    """Run them all on the same slots."""
    quiet()
    file = Path(sys.argv[1])
    world = connect_world()
    topology = None
    for run in json.loads(file.read_text()):
        began = time.monotonic()
        resolved = resolve("lora-fedavg", run["overrides"])
        topology = topology or connect_slots(world, resolved.config.cluster)
        federation = Federation(check(resolved, world.size), world, began, topology)
        federation.run(Progress(speaks=False))
        if world.rank == 0:
            np.save(file.parent / f"{run['name']}.npy", federation.shared.numpy())
            print(f"{run['name']}: {time.monotonic() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()
