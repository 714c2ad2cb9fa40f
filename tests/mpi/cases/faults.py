"""Case: clients that fail cost their own update, are named, and leave no trace in others."""

import json
from pathlib import Path

import numpy as np
import torch

from hpcfed.adapters.layout import HEAD
from hpcfed.cluster.collectives import MaskedSum
from hpcfed.cluster.topology import Topology
from hpcfed.engine import generation
from hpcfed.engine.failures import ClientError
from hpcfed.rounds.federation import Federation
from hpcfed.rounds.progress import Progress
from tests.mpi.cases.runs import build, clear
from tests.mpi.variants import overrides

Updates = dict[int, tuple[int, np.ndarray]]  # client -> (weight, packed values)


def check(topology: Topology, out: Path, data: Path) -> None:
    """A healthy round, and the same round with two faulty clients."""
    results = {}
    for name in ("healthy", "faulty"):
        clear(topology, out / name)
        federation = build(
            topology,
            "lora-fedavg",
            [*overrides(data, "accumulate", "zero2"), f"model.name={data}/bert-classifier",
             "federation.rounds=1", "federation.clients=4", "federation.per_round=4",
             f"output={out / name}"],
        )  # fmt: skip
        if name == "faulty":
            spoil(federation)
        updates = record(federation)
        federation.run(Progress(speaks=False))
        results[name] = (federation, updates)
    healthy, faulty = results["healthy"], results["faulty"]
    compare(faulty[0], healthy[1], faulty[1], out / "faulty")


def spoil(federation: Federation) -> None:
    """Client 0: its last row has a label that does not exist, which one rank meets, in some
    micro-step. Client 2: the loss is not a number, from its second optimizer step on."""
    federation.setup.train_tokens.labels[federation.setup.rows[0].train[-1]] = 99
    forward = federation.setup.engine.forward
    seen: list[np.ndarray] = []

    def spoiled(rows, batch, tokens):
        if np.isin(batch, federation.setup.rows[2].train).all():
            if not any(batch is other for other in seen):
                seen.append(batch)
            if len(seen) > 1 or len(federation.setup.rows[2].train) <= 8:
                head = [p for n, p in federation.setup.engine.model.named_parameters()
                        if p.requires_grad and "classifier" in n]  # fmt: skip
                head[0].data.fill_(float("nan"))
        return forward(rows, batch, tokens)

    federation.setup.engine.forward = spoiled  # type: ignore[method-assign, assignment]


def record(federation: Federation) -> Updates:
    """client -> (weight, packed values) of every update that is added up."""
    updates: Updates = {}
    run = federation.local.run
    current = []

    def watched(client, *arguments):
        current.append(client)
        MaskedSum.add = add  # type: ignore[method-assign]
        return run(client, *arguments)

    def add(self, values, weight, mask=None):
        updates[current[-1]] = (weight, values.numpy().copy())
        MaskedSum.add = original  # type: ignore[method-assign]
        return original(self, values, weight, mask)

    original = MaskedSum.add
    federation.local.run = watched  # type: ignore[method-assign]
    return updates


def compare(federation: Federation, healthy: Updates, faulty: Updates, out: Path) -> None:
    """The others' updates have the same bits, and the mean is theirs alone."""
    comm = federation.setup.topology.world.comm
    everyone: Updates = {}
    for part in comm.allgather(faulty):
        everyone |= part
    assert sorted(everyone) == [1, 3], sorted(everyone)
    for client, (weight, values) in faulty.items():
        assert weight == healthy[client][0]
        assert np.array_equal(values, healthy[client][1]), f"client {client} has other bits"
    parts = [weight * values.astype(np.float64) for weight, values in everyone.values()]
    total = sum(parts, np.zeros(()))
    mean = (total / sum(weight for weight, _ in everyone.values())).astype(np.float32)
    state = federation.state
    assert state.chosen == federation.layout.blocks and HEAD in state.chosen
    assert torch.equal(state.values, torch.from_numpy(mean))
    assert state.totals.failures == 2
    assert state.totals.up == 2 * len(mean) * 4
    assert state.totals.down == 4 * len(mean) * 4
    if federation.setup.topology.is_root:
        line = json.loads((out / "metrics.jsonl").read_text())
        assert sorted(line["failed"]) == ["0", "2"], line["failed"]
        assert "Target 99 is out of bounds" in line["failed"]["0"], line["failed"]
        assert "not finite" in line["failed"]["2"]
        assert np.isfinite(line["train_loss"])


def inside(topology: Topology, out: Path, words: list[str]) -> dict[str, str]:
    """What a failure in a block becomes where an engine trains, predicts and writes answers: raised
    ("ends"), or told."""
    clear(topology, out)
    federation = build(topology, "lora-fedavg", [*words, f"output={out}"])
    setup = federation.setup
    engine, tokens = setup.engine, setup.test_tokens
    rows = [np.arange(2), np.arange(2, 4)]

    def fail(*_: object) -> None:
        raise ValueError("a block fails")

    acts = {
        "train": lambda: engine.train(rows, tokens, 0),
        "predict": lambda: engine.predict(rows, tokens)[1],
        "write": lambda: generation.write(engine, rows, tokens, [3], 2)[1],
    }
    found = {}
    for name, act in acts.items():
        engine.load(setup.prepared.initial)
        handle = setup.prepared.adapted.blocks[0].register_forward_pre_hook(fail)
        try:
            found[name] = str(act())
        except ClientError as error:
            found[name] = str(error)
        except ValueError:
            found[name] = "ends"
        handle.remove()
    setup.directory.close()
    engine.close()
    return found
