"""Which layers are shared, decided once, after the warm-up, by the clients that are probed."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hpcfed import registry
from hpcfed.cluster.collectives import sum_over_ranks
from hpcfed.data.batches import Floats, Ids, Tokens, form_batches
from hpcfed.data.partition import ClientRows
from hpcfed.engine.engine import Engine
from hpcfed.engine.failures import ClientError
from hpcfed.engine.probe import gradient, hessian_product
from hpcfed.errors import RunError
from hpcfed.importance.spectrum import STEPS, eigengap, lanczos, plateau, quadrature
from hpcfed.policies import layers
from hpcfed.policies.sampling import again, spread
from hpcfed.rng import derive, generator
from hpcfed.settings.config import Config

# Clients are drawn again so many times where too few can be asked.
REDRAWS = 3

# Fraction of the layers where the rule for their number finds nothing.
FIXED = 0.5


@dataclass(frozen=True)
class Selection:
    """The shared layers, the sample passes it cost, and what is kept on record."""

    chosen: list[str]
    samples: int = 0
    record: dict[str, Any] = field(default_factory=dict)


@dataclass
class Estimate:
    """What a client's spectrum says: the fraction of the layers to keep (None: its rule found
    none), the Lipschitz constant, Ritz values and weights (STEPS,), zeros where there are fewer."""

    fraction: float | None
    lipschitz: float
    nodes: torch.Tensor
    weights: torch.Tensor
    passes: int = 0  # sample passes it cost

    SIZE = 3 + 2 * STEPS

    def pack(self) -> Floats:
        """(SIZE,) numbers, to travel."""
        fraction = -1.0 if self.fraction is None else self.fraction
        return np.array(
            [fraction, self.lipschitz, self.passes, *self.nodes.tolist(), *self.weights.tolist()]
        )

    @staticmethod
    def unpack(packed: Floats) -> "Estimate":
        """What `pack` packed."""
        nodes, weights = torch.from_numpy(packed[3:]).reshape(2, STEPS)
        fraction = None if packed[0] < 0 else float(packed[0])
        return Estimate(fraction, float(packed[1]), nodes, weights, int(packed[2]))

    def record(self) -> dict[str, Any]:
        """For selection.json."""
        real = self.weights > 0
        return {
            "share": self.fraction,
            "lipschitz": self.lipschitz,
            "nodes": self.nodes[real].tolist(),
            "weights": self.weights[real].tolist(),
        }


def select(
    config: Config,
    engine: Engine,
    rows: list[ClientRows],
    tokens: Tokens,
    initial: torch.Tensor,
    vector: torch.Tensor,
) -> Selection:
    """Choose the shared layers. Collective over all ranks.

    They are scored at the `initial` values (layout.size,), their number is estimated at `vector`,
    after the warm-up. (A few rounds on skewed clients can leave a layer saturated, which a score
    then takes for unimportant: measured on trec at Dirichlet 0.3, where the last layer dropped out
    of the choice in 2 of 3 seeds, and with it 9 and 14 points of accuracy.)
    """
    spec = config.layers
    names = engine.layout.layers
    rng = generator(config.seed, "layers")
    scores, samples = None, 0
    record: dict[str, Any] = {}
    score = registry.SCORES[spec.score]
    if isinstance(score, layers.Measured):
        size = score.samples or config.local.batch_size

        def ask(k: int) -> Floats:
            return score.ask(engine, first_batch(config, rows, tokens, k, size), tokens)

        by_client, probed = over_clients(config, engine, rows, initial, len(names), ask)
        asked = [first_batch(config, rows, tokens, k, size) for k in probed]
        weights = np.array([len(rows[k].train) for k in by_client], dtype=np.float64)
        scores = np.average(np.array(list(by_client.values())), axis=0, weights=weights)
        samples = score.passes * sum(map(len, asked))
        record = {
            "scores": dict(zip(names, scores.tolist(), strict=True)),
            "clients": {str(k): values.tolist() for k, values in by_client.items()},
        }
    fraction, spent, how = _fraction(config, engine, rows, tokens, vector)
    chosen = layers.choose(spec.score, layers.count(fraction, len(names)), names, rng, scores)
    record = {"score": spec.score, "shared_layers": chosen, **record, **how}
    return Selection(chosen, samples + spent, record)


def _fraction(
    config: Config, engine: Engine, rows: list[ClientRows], tokens: Tokens, vector: torch.Tensor
) -> tuple[float, int, dict[str, Any]]:
    """Fraction of the layers that is shared, the sample passes it cost, and the record."""
    spec = config.layers
    if spec.score == "all":
        return 1.0, 0, {}
    if spec.keep != "lossless":
        return spec.keep, 0, {"share": spec.keep}
    packed, _ = over_clients(
        config, engine, rows, vector, Estimate.SIZE,
        lambda k: _lossless(config, engine, rows, tokens, vector, k).pack(),
    )  # fmt: skip
    estimates = {k: Estimate.unpack(numbers) for k, numbers in packed.items()}
    spent = sum(e.passes for e in estimates.values())
    fractions = {k: e.fraction for k, e in estimates.items() if e.fraction is not None}
    how: dict[str, Any] = {
        "rule": spec.rule,
        "spectra": {str(k): e.record() for k, e in estimates.items()},
    }
    if 2 * len(fractions) < len(estimates):
        how["fallback"] = (
            f"the {spec.rule} rule found a share on {len(fractions)} of {len(estimates)} clients, "
            f"less than half: fixed share {FIXED}"
        )
        return FIXED, spent, {"share": FIXED, **how}
    weights = [len(rows[k].train) for k in fractions]
    fraction = float(np.average(list(fractions.values()), weights=weights))
    return fraction, spent, {"share": fraction, **how}


def _lossless(
    config: Config,
    engine: Engine,
    rows: list[ClientRows],
    tokens: Tokens,
    vector: torch.Tensor,
    k: int,
) -> Estimate:
    """A client's estimate by the configured rule."""
    batch = first_batch(config, rows, tokens, k, config.local.batch_size)
    start = generator(config.seed, "lanczos", k).integers(0, 2, len(vector)) * 2.0 - 1.0
    estimate = Estimate(None, 0.0, *torch.zeros(2, STEPS, dtype=torch.float64))

    def product(direction: torch.Tensor) -> torch.Tensor:
        estimate.passes += 2 * len(batch)
        return hessian_product(engine, vector, direction, batch, tokens)

    diagonal, off = lanczos(product, torch.from_numpy(start))
    spectrum = quadrature(diagonal, off, STEPS)
    estimate.nodes[: len(diagonal)] = spectrum.nodes
    estimate.weights[: len(diagonal)] = spectrum.weights
    if config.layers.rule == "plateau":
        estimate.fraction = plateau(spectrum)
        return estimate
    # Lip of B(D) = H D - grad F(P + D), probed where a local update of this client leads.
    engine.load(vector)
    seed = derive(config.seed, "probe", k, engine.topology.rank_in_slot)
    rng = generator(config.seed, "probe batches", k)
    epoch = form_batches(rows[k].train, tokens.lengths, config.local.batch_size, rng)
    estimate.passes += engine.train(epoch, tokens, seed).samples
    update = engine.read().double() - vector.double()
    moved = []
    for at in (vector, (vector.double() + update).float()):
        engine.load(at)
        moved.append(gradient(engine, batch, tokens))
        estimate.passes += len(batch)
    rest = product(update) - (moved[1] - moved[0])
    if float(update.norm()) > 0:
        estimate.lipschitz = float(rest.norm() / update.norm())
        estimate.fraction = eigengap(diagonal, off, estimate.lipschitz)
    return estimate


def probe_clients(
    config: Config, rows: list[ClientRows], earlier: Sequence[Collection[int]] = ()
) -> list[int]:
    """The clients that are asked, drawn once. earlier: draws of which too few could answer."""
    number = min(config.layers.probe_clients, len(rows))
    if not earlier:
        drawn = generator(config.seed, "probe").choice(len(rows), number, replace=False)
        return sorted(int(k) for k in drawn)
    rng = generator(config.seed, "probe again", len(earlier))
    return again(rng, len(rows), number, earlier)


def first_batch(
    config: Config, rows: list[ClientRows], tokens: Tokens, client: int, size: int
) -> Ids:
    """`size` of a client's rows, or all it has, drawn at random."""
    rng = generator(config.seed, "probe", client)
    batch: Ids = rng.permutation(rows[client].train)[:size]
    return batch[np.argsort(tokens.lengths[batch], kind="stable")]


def over_clients(
    config: Config,
    engine: Engine,
    rows: list[ClientRows],
    vector: torch.Tensor,
    size: int,
    ask: Callable[[int], Floats],
) -> tuple[dict[int, Floats], list[int]]:
    """Ask clients, spread over the slots, for (size,) numbers each, at `vector`: the answers of
    those that could, and all that were asked; the same on all ranks.

    Others are asked, a few times, where fewer than federation.min_clients can answer. Raises
    RunError, on all ranks, if it stays so, and StopError if the job has to stop.
    """
    earlier: list[list[int]] = []
    while len(earlier) <= REDRAWS:
        clients = probe_clients(config, rows, earlier)
        able, reasons = _answers(engine, rows, vector, clients, size, ask)
        earlier.append(clients)
        if len(able) >= min(config.federation.min_clients, len(clients)):
            return able, sorted({k for draw in earlier for k in draw})
    client, why = next(iter(reasons.items()))
    raise RunError(
        f"The layers could not be chosen: in {len(earlier)} draws of {len(clients)} clients fewer "
        f"than {config.federation.min_clients} (federation.min_clients) could be asked; client "
        f"{client}: {why}. What is committed is kept: mend the cause, as with a smaller local.lr, "
        "and go on with --resume."
    )


def _answers(
    engine: Engine,
    rows: list[ClientRows],
    vector: torch.Tensor,
    clients: list[int],
    size: int,
    ask: Callable[[int], Floats],
) -> tuple[dict[int, Floats], dict[int, str]]:
    """What these clients answer, and why others could not; the same on all ranks."""
    topology = engine.topology
    answers = np.zeros((len(clients), size + 1))
    reasons: dict[int, str] = {}
    lanes = spread({k: len(rows[k].train) for k in clients}, topology.slots)
    for k in lanes[topology.slot_index]:
        topology.world.watch.doing(f"asking client {k} which layers matter")
        engine.load(vector)
        try:
            answer = ask(k)
        except ClientError as failure:
            if engine.interrupted:
                break
            reasons[k] = str(failure)
            continue
        if not np.isfinite(answer).all():
            reasons[k] = "what it answers is not finite"
        elif topology.leads_slot:
            answers[clients.index(k)] = [1, *answer]
    answers = sum_over_ranks(answers, topology)
    engine.leave_if_interrupted()
    able = {k: answer[1:] for k, answer in zip(clients, answers, strict=True) if answer[0]}
    if len(able) < len(clients):
        gathered = topology.world.comm.allgather(reasons)
        reasons = {k: text for part in gathered for k, text in part.items()}
    return able, reasons
