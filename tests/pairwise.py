"""Few cases in which each value, or each pair of values, of several factors meets at least once."""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Case = tuple[Any, ...]
Factors = Mapping[str, Sequence[Any]]


def product(factors: Factors, legal: Callable[..., bool] = lambda *_: True) -> list[Case]:
    """All combinations that are legal, in the factors' order."""
    return [case for case in itertools.product(*factors.values()) if legal(*case)]


def pairwise(factors: Factors, legal: Callable[..., bool] = lambda *_: True) -> list[Case]:
    """Cases in which each pair of values of any two factors meets: greedily, the one that holds
    most pairs not met before; always the same cases."""
    return _cover(product(factors, legal), 2)


def each(factors: Factors, legal: Callable[..., bool] = lambda *_: True) -> list[Case]:
    """Cases in which each value of each factor is met, in combinations as unlike as can be."""
    return _cover(product(factors, legal), 1)


def others(factors: Factors, few: Sequence[Case]) -> list[Case]:
    """The full product without those few: first what is missing for each pair of values to meet."""
    pairs = [case for case in pairwise(factors) if case not in few]
    return [*pairs, *(case for case in product(factors) if case not in few and case not in pairs)]


def _cover(cases: Sequence[Case], strength: int) -> list[Case]:
    """Greedily, cases that meet all combinations of so many values: the one that meets most new
    ones, of those the one that meets most new pairs, of those the one whose values were used least.
    """
    missing = {part for case in cases for part in _parts(case, strength)}
    pairs = {pair for case in cases for pair in _parts(case, 2)}
    uses: Counter[tuple[int, Any]] = Counter()

    def gain(case: Case) -> tuple[int, int, int]:
        new = len(missing & _parts(case, strength)), len(pairs & _parts(case, 2))
        return (*new, -sum(uses[value] for value in enumerate(case)))

    chosen = []
    while missing:
        best = max(cases, key=gain)
        chosen.append(best)
        missing -= _parts(best, strength)
        pairs -= _parts(best, 2)
        uses.update(enumerate(best))
    return sorted(chosen, key=cases.index)


def _parts(case: Case, strength: int) -> set[tuple[tuple[int, Any], ...]]:
    return set(itertools.combinations(enumerate(case), strength))
