"""Which layers are shared, decided once, after the warm-up, by the clients that are probed."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hpcfed.client import Client, ClientError, Floats
from hpcfed.collectives import sum_over_ranks
from hpcfed.config import Config
from hpcfed.data.batches import Tokens
from hpcfed.data.partition import ClientRows
from hpcfed.errors import UserError
from hpcfed.policies import layers
from hpcfed.policies.sampling import spread
from hpcfed.probe import sensitivity
from hpcfed.rng import generator


@dataclass(frozen=True)
class Selection:
    """The shared layers, the sample passes it cost, and what is kept on record."""

    chosen: list[str]
    samples: int = 0
    record: dict[str, Any] = field(default_factory=dict)


def select(
    config: Config,
    client: Client,
    rows: list[ClientRows],
    tokens: Tokens,
    vector: torch.Tensor,
) -> Selection:
    """Choose the shared layers at `vector` (layout.size,). Collective over all ranks."""
    spec = config.layers
    names = client.layout.layers
    rng = generator(config.seed, "layers")
    scores, record, samples = None, {}, 0
    if spec.score == "sensitivity":
        probed = probe_clients(config, rows)
        found = over_clients(
            config, client, rows, vector, probed, len(names),
            lambda k: sensitivity(client, first_batch(config, rows, tokens, k), tokens),
        )  # fmt: skip
        weights = np.array([len(rows[k].train) for k in found], dtype=np.float64)
        scores = np.average(np.array(list(found.values())), axis=0, weights=weights)
        # A forward with noise on top of a forward and backward: counted as a second pass.
        samples = sum(2 * len(first_batch(config, rows, tokens, k)) for k in probed)
        record = {
            "scores": dict(zip(names, scores.tolist(), strict=True)),
            "clients": {str(k): own.tolist() for k, own in found.items()},
        }
    number = layers.count(spec.keep, len(names))
    chosen = layers.choose(spec.score, number, names, rng, scores)
    return Selection(chosen, samples, {"score": spec.score, "shared_layers": chosen, **record})


def probe_clients(config: Config, rows: list[ClientRows]) -> list[int]:
    """The clients that are asked, drawn once; those without training rows are not."""
    able = [k for k, own in enumerate(rows) if len(own.train)]
    number = min(config.layers.probe_clients, len(able))
    drawn = generator(config.seed, "probe").choice(able, number, replace=False)
    return sorted(int(k) for k in drawn)


def first_batch(config: Config, rows: list[ClientRows], tokens: Tokens, client: int) -> Any:
    """One batch of a client's rows, drawn at random."""
    rng = generator(config.seed, "probe", client)
    own = rng.permutation(rows[client].train)[: config.local.batch_size]
    return own[np.argsort(tokens.lengths[own], kind="stable")]


def over_clients(
    config: Config,
    client: Client,
    rows: list[ClientRows],
    vector: torch.Tensor,
    clients: list[int],
    size: int,
    ask: Callable[[int], Floats],
) -> dict[int, Floats]:
    """Ask clients, spread over the slots, for (size,) numbers each, at `vector`; the same on all
    ranks. Clients that fail are left out. Raises UserError if all do."""
    topology = client.topology
    answers = np.zeros((len(clients), size + 1))
    lanes = spread({k: len(rows[k].train) for k in clients}, topology.slots)
    for k in lanes[topology.slot_index]:
        client.load(vector)
        try:
            found = ask(k)
        except ClientError:
            continue
        if topology.leads_slot and np.isfinite(found).all():
            answers[clients.index(k)] = [1, *found]
    answers = sum_over_ranks(answers, topology)
    able = {k: own[1:] for k, own in zip(clients, answers, strict=True) if own[0]}
    if not able:
        raise UserError(
            "The layers could not be chosen: every client that was probed failed, or gave values "
            "that are not finite; try a smaller local.lr, or layers.score=all."
        )
    return able
