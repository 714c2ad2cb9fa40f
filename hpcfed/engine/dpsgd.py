"""DP-SGD in a slot's engine (Abadi et al. 2016): per-sample gradients clipped to C, noise on their
sum, a fixed denominator; at every ZeRO stage, on any number of ranks.

A first backward tells the norm of each row's gradient, from module hooks, and makes no parameter's
gradient; the second one is of the losses, each times min(1, C / norm), so that what the engine adds
up is the sum of clipped gradients, and no rank ever holds more than one gradient. The same dropout
falls in both.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hpcfed.data.batches import Ids, Tokens
from hpcfed.engine.engine import Engine
from hpcfed.engine.failures import ClientError
from hpcfed.engine.probe import input_gradient
from hpcfed.engine.trained import Trained
from hpcfed.importance.fisher import FisherSums

SLACK = 1 + 1e-5  # for rounding in the norm and in the second backward, both fp32


@dataclass(frozen=True)
class Release:
    """clip: C. expected: rows of a step on average, which the noised sum is divided by. noise:
    (step, size) -> (size,) of N(0, (z C)^2). filler: a row to pass where a step has none."""

    clip: float
    expected: float
    noise: Callable[[int, int], torch.Tensor]
    filler: Ids


def train(
    engine: Engine,
    batches: Sequence[Ids],
    tokens: Tokens,
    dropout_seed: int,
    release: Release,
    trainable: torch.Tensor | None = None,
) -> Trained:
    """As Engine.train: one optimizer step per batch, of the noised sum of clipped gradients.

    trainable: (layout.size,) bool, what trains; the norm is over that. A batch may be empty.
    Raises ClientError on all ranks of the slot if any rank fails outside a collective.
    """
    topology, layout = engine.topology, engine.layout
    engine.training()
    result = Trained()
    total = torch.zeros((), dtype=torch.float64, device=topology.device)
    scale = topology.ranks_per_client / release.expected
    moving = {
        index
        for index, entries in enumerate(engine.owners.values())
        if trainable is None
        or any(bool(trainable[layout.entries[e].values].any()) for e in entries)
    }
    passes = 0
    for step, batch in enumerate(batches):
        noise = release.noise(step, layout.size) * scale if topology.rank_in_slot == 0 else None
        engine.disturb(noise)
        filled = batch if len(batch) else release.filler
        micro_steps = engine.micro_batches(filled)
        for number, rows in enumerate(micro_steps):
            own = rows if len(batch) else rows[:0]
            passes += 1
            engine.boundary(number == len(micro_steps) - 1)
            try:
                torch.manual_seed(dropout_seed + passes)
                factors = _factors(engine, own, filled, tokens, release.clip, moving)
                torch.manual_seed(dropout_seed + passes)
                losses = engine.forward(own, filled, tokens)
            except ClientError:
                engine.taps.listen(None)
                engine.discard(number > 0)
                raise
            engine.backward((losses * factors).sum() * scale)
            total += losses.detach().sum()
        engine.step(total)
        result.samples += len(batch)
        result.tokens += int(tokens.lengths[batch].sum())
        result.steps += 1
    result.loss_sum = engine.loss_sum(total)
    return result


def _factors(
    engine: Engine, rows: Ids, batch: Ids, tokens: Tokens, clip: float, moving: set[int]
) -> torch.Tensor:
    """(len(rows) or 1,) min(1, C / norm of the row's gradient) of this rank's rows."""
    sums = FisherSums([None] * len(engine.owners), engine.topology.device)
    sums.batch(max(len(rows), 1), 1.0)

    def consume(index: int, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        if index in moving:
            sums(index, weight, bias)

    with engine.watch.watch(outputs=False):
        input_gradient(engine, rows, batch, tokens, consume)
    norm = sums.trace.sqrt() * SLACK
    return torch.where(norm > clip, clip / norm, torch.ones_like(norm))
