"""Program: what FibecFed hands to MPI is the selected layers' values, and nothing that stays home;
and with control variates on the server, too, a round is one exchange.

usage: wire.py OUT     OUT holds the data of tests.mpi.variants; one rank per client, and more
ranks than clients in a round, so that no client's values hide in a sum with another's
"""

import json
import pickle
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hpcfed import preflight
from hpcfed.account import FP32_BYTES
from hpcfed.adapters.layout import HEAD
from hpcfed.cli import quiet
from hpcfed.federation import Federation
from hpcfed.local import LocalRounds
from hpcfed.progress import Progress
from hpcfed.resolve import resolve
from hpcfed.topology import connect_slots, connect_world
from tests.mpi.variants import FIBECFED

ORIGINAL = LocalRounds.run


class Spy:
    """A communicator that remembers what is called, and the numbers in all that is handed to it."""

    def __init__(self, comm: Any, seen: list[np.ndarray]) -> None:
        self._comm, self._seen = comm, seen
        self.calls: Counter[str] = Counter()
        self.largest = 0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._comm, name)
        if not callable(method):
            return method

        def watched(*arguments: Any, **options: Any) -> Any:
            self.calls[name] += 1
            for argument in (*arguments, *options.values()):
                self._look(argument)
            return method(*arguments, **options)

        return watched

    def _look(self, argument: Any) -> None:
        parts = argument if isinstance(argument, (list, tuple)) else [argument]
        for part in parts:
            if isinstance(part, np.ndarray):
                self._seen.append(part.astype(np.float64).ravel())
                self.largest = max(self.largest, part.size)
            elif isinstance(part, (dict, str)):  # pickled: by text, so that nothing hides in it
                assert len(pickle.dumps(part)) < 1000, f"a large object travels: {part!r:.200}"


def main() -> None:
    """Four rounds, watched."""
    quiet()
    (out,) = sys.argv[1:]
    world = connect_world()
    topology = connect_slots(world, resolve("fibecfed", FIBECFED).config.cluster)
    control = ["server.optimizer=momentum", "server.control=true"]
    for name, words in (("wire", []), ("control", control)):
        run = Path(out) / name
        resolved = resolve("fibecfed", [*FIBECFED, *words, f"data.root={out}", f"output={run}"])
        seen: list[np.ndarray] = []
        everyone, across = Spy(world.comm, seen), Spy(topology.across, seen)
        watched_world = replace(world, comm=everyone)
        watched = replace(
            topology, world=watched_world, across=across, slot=Spy(topology.slot, seen)
        )
        checked = preflight.check(resolved, world.size)
        federation = Federation(checked, watched_world, time.monotonic(), watched)
        trained = watch_training(federation)
        federation.run(Progress(speaks=False))
        LocalRounds.run = ORIGINAL  # type: ignore[method-assign]
        check_calls(federation, everyone, across)
        if name == "wire":
            check_home(federation, trained, seen)
            check_bytes(federation, run)
    if world.rank == 0:
        print("wire: ok")


def check_calls(federation: Federation, everyone: Spy, across: Spy) -> None:
    """Between the slots: the statistics, the weight, and one exchange a round, in the two halves of
    an Allreduce. What all ranks tell each other besides is small."""
    rounds = federation.config.federation.rounds
    exchange = {"Allreduce": 2 * rounds, "Alltoallv": rounds, "Allgatherv": rounds}
    assert across.calls == exchange, across.calls
    assert across.largest > 10000 and everyone.largest < 1000, everyone.largest


def check_home(
    federation: Federation, trained: list[tuple[int, int, Any]], seen: list[np.ndarray]
) -> None:
    """No value of a layer that stays home is in what was handed to MPI; the others' are."""
    comm = federation.topology.world.comm
    layout, personal = federation.layout, federation.personal_blocks
    assert len(personal) == 3 and comm.allreduce(len(trained)) == 4 * 3
    travelled = set(np.concatenate(seen).tolist())
    home = shared = 0
    for client, number, values in trained:
        if number < federation.config.curriculum.warmup:
            continue
        weight = len(federation.rows[client].train)
        start = federation.base
        for block in layout.blocks:
            span = layout.span(block)
            moved = values[span][values[span] != start[span]].double().numpy()
            there = np.isin(moved, list(travelled)) | np.isin(weight * moved, list(travelled))
            if block in personal:
                home += len(moved)
                # A few fp32 numbers of the same size are equal by chance.
                share = there.mean()
                assert share < 0.02, f"client {client}: {share:.0%} of layer {block} travelled"
            else:
                assert not len(moved) or there.mean() > 0.99, f"{block} did not travel whole"
                shared += len(moved)
    home, shared = comm.allreduce(home), comm.allreduce(shared)
    assert home > 10000 and shared > 10000, f"the watch saw too little: {home}, {shared}"


def watch_training(federation: Federation) -> list[tuple[int, int, Any]]:
    """(client, round, values after training) of this slot, as they come."""
    trained = []

    def run(self: LocalRounds, client: int, number: int, *rest: Any) -> Any:
        done = ORIGINAL(self, client, number, *rest)
        trained.append((client, number, done.values))
        return done

    LocalRounds.run = run  # type: ignore[method-assign]
    return trained


def check_bytes(federation: Federation, run: Path) -> None:
    """A round's upload: 4 bytes for each value of the selected layers and the head, per client."""
    layout, config = federation.layout, federation.config
    if not federation.topology.is_root:
        return
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        warm = line["round"] <= config.curriculum.warmup
        blocks = layout.blocks if warm else (*line["shared_layers"], HEAD)
        values = layout.count(blocks)
        assert len(blocks) == (7 if warm else 4)
        assert line["bytes"]["up"] == config.federation.per_round * values * FP32_BYTES
        # Each slot's sums of values, a weight and statistics, as float64; then the mean.
        slots = federation.topology.slots
        small = 1 + config.federation.per_round * 6 + 2 * slots + 2
        assert line["bytes"]["wire"] == (values + small) * 8 * slots + values * 4


if __name__ == "__main__":
    main()
