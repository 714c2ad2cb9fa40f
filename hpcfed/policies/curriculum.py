"""Curriculum: which of a client's batches a round trains on, the easiest first, and how much of
their texts.

FibecFed (EMNLP 2024) orders by Fisher information and widens the portion of the data in use; the
shapes of the pace are our reading.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hpcfed.data.batches import Floats, Ids, Tokens

# Difficulty of a row that no pass has met yet.
UNKNOWN = np.inf
# Tokens that are left of any text.
SHORTEST = 4


@dataclass(frozen=True)
class Measured:
    """A difficulty that is read from the model in training passes, or a pass of its own: `fisher`
    or `loss`; None: there is none, the order is random. hardest_first: reversed."""

    reads: str | None
    hardest_first: bool = False


FISHER, LOSS, RANDOM = Measured("fisher"), Measured("loss"), Measured(None)
REVERSED = Measured("fisher", hardest_first=True)

# Any other difficulty is a function of the texts: (rows, tokens) -> (len(rows),), the larger the
# harder. rows: the client's training rows, numbers into tokens.
OfTexts = Callable[[Ids, Tokens], Floats]


def portion(pace: str, start: float, full_at: float, round_number: int, rounds: int) -> float:
    """f(t), t = round_number (from 0): the portion of its batches that a client trains on.

    start: the portion in round 0. full_at: the fraction of the rounds after which all are in use.
    linear f = b + (1-b) x, sqrt f = sqrt(b^2 + (1-b^2) x), exp f = b^(1-x), with x = t / (full_at
    * rounds); all f = 1.
    """
    x = round_number / (full_at * rounds)
    if pace == "all" or x >= 1:
        return 1.0
    if pace == "linear":
        return start + (1 - start) * x
    if pace == "sqrt":
        return math.sqrt(start**2 + (1 - start**2) * x)
    if pace == "exp":
        return float(start ** (1 - x))
    raise ValueError(f"unknown pace {pace!r}")


def cut_at(
    cut: str, shortest: float, full_at: float, round_number: int, rounds: int, longest: int
) -> int:
    """The number of tokens at which training texts are cut in round `round_number` (from 0).

    linear (sequence length warm-up, Li et al. 2022): from shortest * longest to longest; stage
    (Shortformer, Press et al. 2021): the one, then the other; none: longest. full_at: as in
    `portion`.
    """
    x = round_number / (full_at * rounds)
    if cut == "none" or x >= 1:
        return longest
    first = max(SHORTEST, round(shortest * longest))
    if cut == "linear":
        return first + math.floor((longest - first) * x)
    if cut == "stage":
        return first
    raise ValueError(f"unknown cut {cut!r}")


def length(rows: Ids, tokens: Tokens) -> Floats:
    """Tokens of each text."""
    return tokens.lengths[rows].astype(np.float64)


def rarity(rows: Ids, tokens: Tokens) -> Floats:
    """The mean of -log of each token's frequency, counted on these rows only: nothing leaves the
    client. Platanios et al. 2019 take the sum, which mostly orders by length."""
    texts = [tokens.row(row) for row in rows]
    counts = np.bincount(np.concatenate(texts))
    surprise = -np.log(np.maximum(counts, 1) / counts.sum())
    return np.array([surprise[text].mean() for text in texts])


def batch_difficulty(
    batches: Sequence[Ids], difficulty: Floats, hardest_first: bool = False
) -> Floats:
    """(len(batches),) summed over each batch's samples, to be sorted ascending; difficulty is
    indexed by row. A batch with a row of UNKNOWN difficulty comes last in any case."""
    sums = np.array([difficulty[batch].sum() for batch in batches])
    return np.where(np.isinf(sums), UNKNOWN, -sums) if hardest_first else sums


def order(difficulty: Floats | None, count: int, rng: np.random.Generator) -> list[int]:
    """Batch numbers, easy first; ties in the batches' own order. None: at random."""
    if difficulty is None:
        return [int(i) for i in rng.permutation(count)]
    return [int(i) for i in np.argsort(difficulty, kind="stable")]


def in_use(ordered: Sequence[int], f: float) -> list[int]:
    """The first ceil(f * n), at least one."""
    # Rounded first: 0.7 * 10 is 7.000000000000001 on some paths to 0.7, and must not count as 8.
    return list(ordered[: max(1, math.ceil(round(f * len(ordered), 9)))])
