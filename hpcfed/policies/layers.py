"""Which layers are shared: their values travel, the others stay with their client."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

# Scores that are measured on clients.
SCORED = ("sensitivity", "eigenvalue")


def count(fraction: float, layers: int) -> int:
    """clip(round(fraction * L), 1, L), halves rounded up."""
    return min(layers, max(1, math.floor(fraction * layers + 0.5)))


def choose(
    score: str,
    number: int,
    layers: Sequence[str],
    rng: np.random.Generator,
    scores: npt.NDArray[np.float64] | None = None,
) -> list[str]:
    """The shared layers, in the model's order: `all` of them, else `number` of the L.

    `sensitivity` and `eigenvalue` take those with the highest scores (L,), ties to the lower.
    """
    if score == "all":
        return list(layers)
    if score == "first":
        return list(layers[:number])
    if score == "last":
        return list(layers[-number:])
    if score == "random":
        picks = np.sort(rng.permutation(len(layers))[:number])
    elif score in SCORED:
        assert scores is not None
        picks = np.sort(np.argsort(-scores, kind="stable")[:number])
    else:
        raise ValueError(f"unknown layer score {score!r}")
    return [layers[i] for i in picks]
