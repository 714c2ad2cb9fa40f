"""Which layers are shared: their values travel, the others stay with their client."""

import math
from collections.abc import Sequence

import numpy as np


def choose(score: str, keep: float, layers: Sequence[str], rng: np.random.Generator) -> list[str]:
    """The shared layers, in the model's order.

    `all` shares every layer; `first`, `last` and `random` share max(1, round(keep * L)) of the L.
    """
    if score == "all":
        return list(layers)
    count = max(1, math.floor(keep * len(layers) + 0.5))
    if score == "first":
        return list(layers[:count])
    if score == "last":
        return list(layers[-count:])
    if score == "random":
        picks = np.sort(rng.permutation(len(layers))[:count])
        return [layers[i] for i in picks]
    raise ValueError(f"unknown layer score {score!r}")
