"""Which layers are shared, decided once, after the warm-up, by the clients that are probed."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hpcfed.client import Client, ClientError
from hpcfed.collectives import sum_over_ranks
from hpcfed.config import Config
from hpcfed.data.batches import Floats, Ids, Tokens, form_batches
from hpcfed.data.partition import ClientRows
from hpcfed.importance.spectrum import STEPS, eigengap, lanczos, plateau, quadrature
from hpcfed.policies import layers
from hpcfed.policies.sampling import spread
from hpcfed.probe import gradient, hessian_product, sensitivity
from hpcfed.rng import derive, generator

# Share of the layers where the rule for their number finds nothing.
FIXED = 0.5


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
    scores, samples = None, 0
    record: dict[str, Any] = {}
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
    share, spent, how = _share(config, client, rows, tokens, vector)
    chosen = layers.choose(spec.score, layers.count(share, len(names)), names, rng, scores)
    record = {"score": spec.score, "shared_layers": chosen, **record, **how}
    return Selection(chosen, samples + spent, record)


def _share(
    config: Config, client: Client, rows: list[ClientRows], tokens: Tokens, vector: torch.Tensor
) -> tuple[float, int, dict[str, Any]]:
    """Share of the layers that is shared, the sample passes it cost, and the record."""
    spec = config.layers
    if spec.score == "all":
        return 1.0, 0, {}
    if spec.keep != "lossless":
        return spec.keep, 0, {"share": spec.keep}
    probed = probe_clients(config, rows)
    passes = np.zeros(len(rows))

    def ask(k: int) -> Floats:
        found = _lossless(config, client, rows, tokens, vector, k, passes)
        return np.concatenate([[found[0]], [found[1]], found[2].numpy(), found[3].numpy()])

    found = over_clients(config, client, rows, vector, probed, 2 + 2 * STEPS, ask)
    spent = int(sum_over_ranks(passes, client.topology).sum())
    shares = {k: own[0] for k, own in found.items() if own[0] >= 0}
    how: dict[str, Any] = {
        "rule": spec.rule,
        "spectra": {
            str(k): {
                "share": own[0] if own[0] >= 0 else None,
                "lipschitz": own[1],
                "nodes": own[2 : 2 + STEPS][own[2 + STEPS :] > 0].tolist(),
                "weights": own[2 + STEPS :][own[2 + STEPS :] > 0].tolist(),
            }
            for k, own in found.items()
        },
    }
    if 2 * len(shares) < len(found):
        how["fallback"] = (
            f"the {spec.rule} rule found a share on {len(shares)} of {len(found)} clients, less "
            f"than half: fixed share {FIXED}"
        )
        return FIXED, spent, {"share": FIXED, **how}
    weights = [len(rows[k].train) for k in shares]
    share = float(np.average(list(shares.values()), weights=weights))
    return share, spent, {"share": share, **how}


def _lossless(
    config: Config,
    client: Client,
    rows: list[ClientRows],
    tokens: Tokens,
    vector: torch.Tensor,
    k: int,
    passes: Floats,
) -> tuple[float, float, torch.Tensor, torch.Tensor]:
    """A client's kept share (-1: the rule found none), the Lipschitz constant, Ritz values and
    weights (STEPS,), zeros where there are fewer. Counts its sample passes in `passes`."""
    batch = first_batch(config, rows, tokens, k)
    leads = client.topology.leads_slot
    start = generator(config.seed, "lanczos", k).integers(0, 2, len(vector)) * 2.0 - 1.0

    def product(direction: torch.Tensor) -> torch.Tensor:
        passes[k] += leads * 2 * len(batch)
        return hessian_product(client, vector, direction, batch, tokens)

    diagonal, off = lanczos(product, torch.from_numpy(start))
    spectrum = quadrature(diagonal, off, STEPS)
    lipschitz = 0.0
    if config.layers.rule == "plateau":
        share = plateau(spectrum)
    else:
        # Lip of B(D) = H D - grad F(P + D), probed where a local update of this client leads.
        client.load(vector)
        seed = derive(config.seed, "probe", k, client.topology.rank_in_slot)
        own = generator(config.seed, "probe batches", k)
        epoch = form_batches(rows[k].train, tokens.lengths, config.local.batch_size, own)
        passes[k] += leads * client.train(epoch, tokens, seed).samples
        update = client.read().double() - vector.double()
        moved = []
        for at in (vector, (vector.double() + update).float()):
            client.load(at)
            moved.append(gradient(client, batch, tokens))
            passes[k] += leads * len(batch)
        rest = product(update) - (moved[1] - moved[0])
        if float(update.norm()) > 0:
            lipschitz = float(rest.norm() / update.norm())
            share = eigengap(diagonal, off, lipschitz)
        else:
            share = None
    nodes, weights = torch.zeros(2, STEPS, dtype=torch.float64)
    nodes[: len(diagonal)], weights[: len(diagonal)] = spectrum.nodes, spectrum.weights
    return -1.0 if share is None else share, lipschitz, nodes, weights


def probe_clients(config: Config, rows: list[ClientRows]) -> list[int]:
    """The clients that are asked, drawn once."""
    number = min(config.layers.probe_clients, len(rows))
    drawn = generator(config.seed, "probe").choice(len(rows), number, replace=False)
    return sorted(int(k) for k in drawn)


def first_batch(config: Config, rows: list[ClientRows], tokens: Tokens, client: int) -> Ids:
    """One batch of a client's rows, drawn at random."""
    rng = generator(config.seed, "probe", client)
    own: Ids = rng.permutation(rows[client].train)[: config.local.batch_size]
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
    ranks. Clients that fail are left out. Raises RuntimeError if all do."""
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
        raise RuntimeError(
            "the layers could not be chosen: every client that was probed failed, or gave values "
            "that are not finite; try a smaller local.lr, or layers.score=all"
        )
    return able
