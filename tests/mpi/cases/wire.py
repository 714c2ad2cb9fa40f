"""Cases: what FibecFed hands to MPI is the selected layers' values, and nothing that stays home;
and with control variates on the server, too, a round is one exchange.

One rank per client, and more ranks than clients in a round, so that no client's values hide in a
sum with another's.
"""

import json
import pickle
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpcfed.adapters.layout import HEAD
from hpcfed.cluster.topology import Topology
from hpcfed.round import Round
from hpcfed.rounds import preflight
from hpcfed.rounds.account import FP32_BYTES
from hpcfed.rounds.federation import Federation
from hpcfed.rounds.local import LocalRounds
from hpcfed.rounds.progress import Progress
from hpcfed.rounds.setup import set_up
from hpcfed.settings.resolve import resolve
from tests.mpi.cases.runs import clear
from tests.mpi.variants import FIBECFED

ORIGINAL = LocalRounds.run
NUMBERS = ("<f4", "<f8", ">f8")  # pickle writes floats the other way round


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
        if isinstance(argument, torch.Tensor):
            argument = argument.detach().cpu().numpy()
        if isinstance(argument, np.ndarray) and argument.dtype.kind in "fiub":
            self._note(argument.astype(np.float64).ravel())
        elif isinstance(argument, (bool, int, float, np.number)):
            self._note(np.array([argument], dtype=np.float64))
        elif isinstance(argument, (list, tuple)):
            for part in argument:
                self._look(part)
        elif isinstance(argument, dict):
            for part in (*argument.keys(), *argument.values()):
                self._look(part)
        elif isinstance(argument, (bytes, bytearray, memoryview)):
            self._read(bytes(argument))
        elif argument is not None and not type(argument).__module__.startswith("mpi4py"):
            self._read(pickle.dumps(argument))

    def _read(self, content: bytes) -> None:
        """Numbers may begin at any byte."""
        for kind in NUMBERS:
            width = np.dtype(kind).itemsize
            for start in range(width):
                end = start + (len(content) - start) // width * width
                numbers = np.frombuffer(content[start:end], dtype=kind)
                with np.errstate(over="ignore", invalid="ignore"):
                    self._note(numbers.astype(np.float64))
        self.largest = max(self.largest, len(content) // 4)

    def _note(self, numbers: np.ndarray) -> None:
        self._seen.append(numbers)
        self.largest = max(self.largest, numbers.size)


def travelled(values: np.ndarray, seen: list[np.ndarray], weight: int = 1) -> np.ndarray:
    """(len(values),) bool: whether each value was handed over, as it is or times `weight`."""
    everything = np.unique(np.concatenate([np.zeros(1), *seen]))
    return np.isin(values, everything) | np.isin(weight * values, everything)


def check_watch(topology: Topology, form: str) -> None:
    """The spy finds secret values in whatever form they are handed over."""
    secret = np.random.default_rng(topology.world.rank).normal(size=50).astype(np.float32)
    seen: list[np.ndarray] = []
    comm: Any = Spy(topology.world.comm, seen)
    if form == "array":
        comm.Allreduce(secret.astype(np.float64), np.empty(50))
    elif form == "bytes":
        comm.allgather(b"x" + secret.tobytes())
    elif form == "float":
        for value in secret:
            comm.allreduce(float(value))
    elif form == "tensor":
        comm.bcast(torch.from_numpy(secret), root=0)
    elif form == "pickled":
        comm.allgather(pickle.dumps(secret.tolist()))
    else:
        comm.allgather({"a": [(torch.from_numpy(secret), "b")]})
    assert travelled(secret.astype(np.float64), seen).all()
    assert not travelled(secret.astype(np.float64) + 1e-3, seen).any()


def check(topology: Topology, out: Path, data: Path, method: str) -> None:
    """Four rounds, watched. method: plain, or with control variates."""
    words = [*FIBECFED, f"data.root={data}", f"model.name={data}/bert-classifier"]
    if method == "control":
        words += ["server.optimizer=momentum", "server.control=true"]
    run = out / method
    clear(topology, run)
    resolved = resolve("fibecfed", [*words, f"output={run}"])
    seen: list[np.ndarray] = []
    everyone, across = Spy(topology.world.comm, seen), Spy(topology.across, seen)
    world = replace(topology.world, comm=everyone)
    watched = replace(topology, world=world, across=across, slot=Spy(topology.slot, seen))
    checked = preflight.check(resolved, world.size)
    federation = Federation(set_up(checked, world, time.monotonic(), watched))
    trained = watch_training(federation)
    try:
        federation.run(Progress(speaks=False))
    finally:
        LocalRounds.run = ORIGINAL  # type: ignore[method-assign]
    check_calls(federation, everyone, across)
    if method == "plain":
        check_home(federation, trained, seen)
        check_bytes(federation, run)


def check_calls(federation: Federation, everyone: Spy, across: Spy) -> None:
    """Between the slots: the statistics, the weight, and one exchange a round, in the two halves of
    an Allreduce. What all ranks tell each other besides is small."""
    rounds = federation.setup.config.federation.rounds
    exchange = {"Allreduce": 2 * rounds, "Alltoallv": rounds, "Allgatherv": rounds}
    assert across.calls == exchange, across.calls
    assert across.largest > federation.layout.size / 2 > 500
    assert everyone.largest < 500, everyone.largest


def check_home(
    federation: Federation, trained: list[tuple[int, int, Any]], seen: list[np.ndarray]
) -> None:
    """No value of a layer that stays home is in what was handed to MPI; the others' are."""
    comm = federation.setup.topology.world.comm
    layout = federation.layout
    personal = federation.sharing.personal(federation.state.chosen).blocks
    assert personal and comm.allreduce(len(trained)) == 4 * 3
    home = shared = 0
    for client, number, values in trained:
        if number < federation.setup.config.curriculum.warmup:
            continue
        weight = len(federation.setup.rows[client].train)
        start = federation.state.values
        for block in layout.blocks:
            span = layout.span(block)
            moved = values[span][values[span] != start[span]].double().numpy()
            there = travelled(moved, seen, weight)
            if block in personal:
                home += len(moved)
                # A few fp32 numbers of the same size are equal by chance.
                portion = there.mean()
                assert portion < 0.02, f"client {client}: {portion:.0%} of layer {block} travelled"
            else:
                assert not len(moved) or there.mean() > 0.99, f"{block} did not travel whole"
                shared += len(moved)
    home, shared = comm.allreduce(home), comm.allreduce(shared)
    assert home > 1000 and shared > 1000, f"the watch saw too little: {home}, {shared}"


def watch_training(federation: Federation) -> list[tuple[int, int, Any]]:
    """(client, round, values after training) of this slot, as they come."""
    trained = []

    def run(self: LocalRounds, client: int, now: Round, *rest: Any) -> Any:
        done = ORIGINAL(self, client, now, *rest)
        trained.append((client, now.number, done.values))
        return done

    LocalRounds.run = run  # type: ignore[method-assign, assignment]
    return trained


def check_bytes(federation: Federation, run: Path) -> None:
    """A round's upload: 4 bytes for each value of the selected layers and the head, per client."""
    layout, config = federation.layout, federation.setup.config
    if not federation.setup.topology.is_root:
        return
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        warm = line["round"] <= config.curriculum.warmup
        blocks = layout.blocks if warm else (*line["shared_layers"], HEAD)
        values = layout.part(blocks).size
        assert len(blocks) == (4 if warm else 3)
        assert line["bytes"]["up"] == config.federation.per_round * values * FP32_BYTES
        # Each slot's sums of values, a weight and statistics, as float64; then the mean.
        slots = federation.setup.topology.slots
        small = 1 + config.federation.per_round * 7 + 2 * slots + 2
        assert line["bytes"]["wire"] == (values + small) * 8 * slots + values * 4
