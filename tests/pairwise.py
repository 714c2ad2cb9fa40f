"""Few cases in which each pair of values of any two factors meets at least once."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Case = tuple[Any, ...]


def product(
    factors: Mapping[str, Sequence[Any]], legal: Callable[..., bool] = lambda *_: True
) -> list[Case]:
    """All combinations that are legal, in the factors' order."""
    return [case for case in itertools.product(*factors.values()) if legal(*case)]


def pairwise(
    factors: Mapping[str, Sequence[Any]], legal: Callable[..., bool] = lambda *_: True
) -> list[Case]:
    """Greedily, the case that holds most pairs not met before; always the same cases."""
    cases = product(factors, legal)
    missing = {pair for case in cases for pair in _pairs(case)}
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(missing & _pairs(case)))
        chosen.append(best)
        missing -= _pairs(best)
    return sorted(chosen, key=cases.index)


def _pairs(case: Case) -> set[tuple[tuple[int, Any], tuple[int, Any]]]:
    return set(itertools.combinations(enumerate(case), 2))
