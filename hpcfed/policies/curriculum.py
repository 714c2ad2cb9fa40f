"""Curriculum: which of a client's batches a round trains on, the easiest first.

FibecFed (EMNLP 2024) orders by Fisher information and widens the share of the data in use; the
shapes of the pace are our reading.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hpcfed.data.batches import Floats, Ids, Tokens

# Difficulty of a row that no pass has met yet.
UNKNOWN = np.inf

# Orders that need the model, by what they read from it; `reversed` is Fisher, the hardest first.
NEEDS = {"fisher": "fisher", "reversed": "fisher", "loss": "loss"}


def share(pace: str, start: float, full_at: float, number: int, rounds: int) -> float:
    """f(t): the share of its batches that a client trains on in round t = number (from 0).

    start: the share in round 0. full_at: the share of the rounds after which all are in use.
    linear f = b + (1-b) x, sqrt f = sqrt(b^2 + (1-b^2) x), exp f = b^(1-x), with x = t / (full_at
    * rounds); all f = 1.
    """
    x = number / (full_at * rounds)
    if pace == "all" or x >= 1:
        return 1.0
    if pace == "linear":
        return start + (1 - start) * x
    if pace == "sqrt":
        return math.sqrt(start**2 + (1 - start**2) * x)
    if pace == "exp":
        return float(start ** (1 - x))
    raise ValueError(f"unknown pace {pace!r}")


@dataclass(frozen=True)
class Rarity:
    """Word rarity of a client's texts: the mean of -log of each token's frequency at this client.

    Platanios et al. 2019 take the sum, which mostly orders by length; the mean orders by words.
    """

    surprise: Floats  # (ids up to the largest,) -log frequency

    @staticmethod
    def of(rows: Ids, tokens: Tokens) -> "Rarity":
        """Counted on these rows only: nothing leaves the client."""
        counts = np.bincount(np.concatenate([_ids(tokens, row) for row in rows]))
        return Rarity(-np.log(np.maximum(counts, 1) / counts.sum()))

    def score(self, row: int, tokens: Tokens) -> float:
        """Of one of those rows."""
        return float(self.surprise[_ids(tokens, row)].mean())


def _ids(tokens: Tokens, row: int) -> npt.NDArray[np.int32]:
    return tokens.ids[tokens.offsets[row] : tokens.offsets[row + 1]]


def text_difficulty(kind: str, rows: Ids, tokens: Tokens) -> Floats:
    """(len(rows),) difficulty that needs no model: `length` in tokens, `rarity` of the words."""
    if kind == "length":
        return tokens.lengths[rows].astype(np.float64)
    if kind == "rarity":
        rarity = Rarity.of(rows, tokens)
        return np.array([rarity.score(int(row), tokens) for row in rows])
    raise ValueError(f"{kind!r} is no difficulty of texts")


def batch_difficulty(kind: str, batches: Sequence[Ids], difficulty: Floats) -> Floats:
    """(len(batches),) summed over each batch's samples, to be sorted ascending; difficulty is
    indexed by row. A batch with a row of UNKNOWN difficulty comes last, whatever the kind."""
    sums = np.array([difficulty[batch].sum() for batch in batches])
    return np.where(np.isinf(sums), UNKNOWN, -sums) if kind == "reversed" else sums


def order(difficulty: Floats | None, count: int, rng: np.random.Generator) -> list[int]:
    """Batch numbers, easy first; ties in the batches' own order. None: at random."""
    if difficulty is None:
        return [int(i) for i in rng.permutation(count)]
    return [int(i) for i in np.argsort(difficulty, kind="stable")]


def in_use(ordered: Sequence[int], f: float) -> list[int]:
    """The first ceil(f * n), at least one."""
    # Rounded first: 0.7 * 10 is 7.000000000000001 on some paths to 0.7, and must not count as 8.
    return list(ordered[: max(1, math.ceil(round(f * len(ordered), 9)))])
