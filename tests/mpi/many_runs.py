"""Program: several runs in one MPI world, one after the other; starting a world costs seconds.

usage: many_runs.py RUNS.json     a list of {"name", "preset", "overrides", "lost"}; all with the
same ranks per client. lost: [round, client] pairs, from 0, whose update cannot be sent. Rank 0
saves each run's final values without personal ones (layout.size,) beside the file, as NAME.npy,
and what they were at first, as NAME-initial.npy; each slot the masks it used, as
NAME-masks-SLOT.npz of round-client.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

from hpcfed.cli import quiet
from hpcfed.federation import Federation
from hpcfed.local import LocalRounds
from hpcfed.policies import sparsity
from hpcfed.preflight import check
from hpcfed.progress import Progress
from hpcfed.resolve import resolve
from hpcfed.topology import connect_slots, connect_world

masks: dict[str, np.ndarray] = {}
lost: list[list[int]] = []


def watch_clients() -> None:
    """Keep every mask that a client trains under, by round and client; spoil the lost ones."""
    run, trainable = LocalRounds.run, sparsity.trainable
    now = [""]

    def noting(self, client, number, *rest):
        now[0] = f"{number}-{client}"
        done = run(self, client, number, *rest)
        if [number, client] in lost:
            done.values.fill_(np.inf)
        return done

    def recording(layout, *rest):
        mask = trainable(layout, *rest)
        masks[now[0]] = np.ones(layout.size, bool) if mask is None else mask.numpy()
        return mask

    LocalRounds.run, sparsity.trainable = noting, recording


def main() -> None:
    """Run them all on the same slots."""
    quiet()
    watch_clients()
    file = Path(sys.argv[1])
    world = connect_world()
    topology = None
    for run in json.loads(file.read_text()):
        began = time.monotonic()
        masks.clear()
        lost[:] = run["lost"]
        resolved = resolve(run["preset"], run["overrides"])
        topology = topology or connect_slots(world, resolved.config.cluster)
        federation = Federation(check(resolved, world.size), world, began, topology)
        federation.run(Progress(speaks=False))
        if world.rank == 0:
            np.save(file.parent / f"{run['name']}.npy", federation.vector(None).numpy())
            np.save(file.parent / f"{run['name']}-initial.npy", federation.prepared.initial.numpy())
        if masks and topology.leads_slot:
            np.savez(file.parent / f"{run['name']}-masks-{topology.slot_index}.npz", **masks)
        if world.rank == 0:
            print(f"{run['name']}: {time.monotonic() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()
