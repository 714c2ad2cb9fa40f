"""Local sparse update: which neurons of a client's own layers train."""

import math

import torch

from hpcfed.adapters.layout import AdapterLayout, Part


def momentum(old: torch.Tensor | None, new: torch.Tensor, gamma: float) -> torch.Tensor:
    """F_t = gamma F_{t-1} + (1 - gamma) Fhat_t, per neuron; F before the first round is 0."""
    return (1 - gamma) * new + (0 if old is None else gamma * old)


def trainable(
    layout: AdapterLayout, scores: torch.Tensor | None, keep: float, personal: Part
) -> torch.Tensor | None:
    """(layout.size,) bool: True trains. None: everything does.

    In each matrix of the personal part the max(1, round(keep * n)) neurons with the highest
    scores train, ties to the lower index; a matrix whose scores are all zero (A, while B is zero)
    trains whole, and so does everything else. scores: (neurons,), None before the
    client's first participation.
    """
    if scores is None or keep == 1 or not personal:
        return None
    neurons = torch.ones(len(scores), dtype=torch.bool)
    for index in personal.indices:
        entry, span = layout.entries[index], layout.neurons[index]
        if not bool(scores[span].any()):
            continue
        count = max(1, math.floor(keep * entry.neurons + 0.5))
        best = torch.sort(scores[span], descending=True, stable=True).indices[:count]
        chosen = torch.zeros(entry.neurons, dtype=torch.bool)
        chosen[best] = True
        neurons[span] = chosen
    return layout.expand(neurons)
