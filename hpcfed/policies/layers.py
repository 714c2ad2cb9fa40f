"""Which layers are shared: their values travel, the others stay with their client."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hpcfed.data.batches import Floats, Ids, Tokens


@dataclass(frozen=True)
class Measured:
    """A layer score that clients measure: ask(engine, rows, tokens) -> (layers,), the same on all
    ranks of the slot; the layers with the highest are shared. rows: of one client, its first batch,
    or `samples` of them. passes: sample passes that it takes, for the account."""

    ask: Callable[[Any, Ids, Tokens], Floats]
    passes: int = 1
    samples: int | None = None


# Scores that are not measured.
ALL, FIRST, LAST, RANDOM = "all", "first", "last", "random"


def count(fraction: float, layers: int) -> int:
    """clip(round(fraction * L), 1, L), halves rounded up."""
    return min(layers, max(1, math.floor(fraction * layers + 0.5)))


def agreed(agreement: Sequence[float], above: float, otherwise: float) -> float:
    """Fraction of the layers that is shared, of how far clients agree on each (importance/
    agreement.py): all of them if on average they agree `above` that, else the fraction
    `otherwise`."""
    return 1.0 if float(np.mean(agreement)) > above else otherwise


def choose(
    score: str,
    number: int,
    layers: Sequence[str],
    rng: np.random.Generator,
    scores: npt.NDArray[np.float64] | None = None,
) -> list[str]:
    """The shared layers, in the model's order: `all` of them, else `number` of the L.

    With scores (L,), those with the highest, ties to the lower.
    """
    if score == ALL:
        return list(layers)
    if score == FIRST:
        return list(layers[:number])
    if score == LAST:
        return list(layers[-number:])
    if scores is not None:
        picks = np.sort(np.argsort(-scores, kind="stable")[:number])
    elif score == RANDOM:
        picks = np.sort(rng.permutation(len(layers))[:number])
    else:
        raise ValueError(f"unknown layer score {score!r}")
    return [layers[i] for i in picks]
