"""The Gaussian mechanism on sums of clipped updates, on a grid.

A client's update is clipped to the norm C and rounded towards zero to whole multiples of a unit,
2^-32 of C or less; the noise N(0, (z C)^2) is rounded to the nearest multiple. So sums in float64
are exact, whatever their order; and since a sum of whole numbers and rounded noise is the rounded
sum with noise, what is published is the Gaussian mechanism's output, rounded: the low bits of
floating-point noise, which can give a value away (Mironov 2012), are not in it.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from hpcfed.privacy.streams import Floats, normals

GRID = 32  # bits
SLACK = 1 + 1e-9  # for rounding in the norm
START = 0.1  # C of adaptive clipping at first, and the next two: Andrew et al. 2021
QUANTILE = 0.5
RATE = 0.2
BIT = 2.0**20  # units of what says whether an update was clipped


def unit(clip: float) -> float:
    """A power of two."""
    return 2.0 ** (math.floor(math.log2(clip)) - GRID)


def clipped(update: torch.Tensor, clip: float) -> tuple[torch.Tensor, bool]:
    """(n,) float64 whole numbers of units, of norm at most clip / unit(clip); and whether the
    update (n,) was within the norm before. What is not finite stays so."""
    update = update.double()
    norm = float(torch.linalg.vector_norm(update)) * SLACK
    factor = 1.0 if norm <= clip else clip / norm
    return torch.trunc(update * (factor / unit(clip))), norm <= clip


def noise(key: bytes, round_number: int, size: int, deviation: float, clip: float) -> Floats:
    """(size,) whole numbers of units of N(0, (deviation clip)^2)."""
    drawn = normals(key, "noise", round_number, size)
    return np.rint(drawn * (deviation * clip / unit(clip)))


@dataclass(frozen=True)
class Adaptive:
    """C follows the median of the norms (Andrew et al. 2021): C *= exp(-RATE (b - QUANTILE)), b the
    noised fraction of updates that were within C.

    deviation: of the noise on the sum of the bits, each -1/2 or 1/2; it has a share of the round's
    noise z, and the update's is raised, so that both together cost what z alone costs.
    """

    deviation: float

    @staticmethod
    def of(noise: float, expected: float) -> "Adaptive":
        """expected: clients of a round, on average. The authors' m/20, if that is enough."""
        return Adaptive(max(expected / 20, noise))

    def raised(self, noise: float) -> float:
        """(z^-2 - (2 deviation)^-2)^(-1/2), of the update."""
        return float((noise**-2 - (2 * self.deviation) ** -2) ** -0.5)

    def bit(self, within: bool) -> float:
        """What a client adds to the sum."""
        return BIT / 2 if within else -BIT / 2

    def noise(self, key: bytes, round_number: int) -> float:
        """What is added to it once."""
        return float(np.rint(normals(key, "clip", round_number, 1)[0] * self.deviation * BIT))

    def next(self, clip: float, total: float, expected: float) -> float:
        """C of the next round. total: of the sum, with noise."""
        fraction = total / BIT / expected + 0.5
        return clip * math.exp(-RATE * (min(1.0, max(0.0, fraction)) - QUANTILE))
