"""Which clients take part in a round, and which slot runs which of them."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from hpcfed.data.batches import Ids
from hpcfed.rng import generator


def sample(
    seed: int,
    round_number: int,
    clients: int,
    per_round: int,
    earlier: Sequence[Collection[int]] = (),
) -> list[int]:
    """Clients of a round, uniformly without replacement, ascending; all if there are fewer.
    earlier: its draws that came to nothing."""
    if earlier:
        rng = generator(seed, "sample again", round_number, len(earlier))
        return again(rng, clients, per_round, earlier)
    rng = generator(seed, "sample", round_number)
    return sorted(int(k) for k in rng.choice(clients, min(per_round, clients), replace=False))


def again(
    rng: np.random.Generator, clients: int, number: int, earlier: Sequence[Collection[int]]
) -> list[int]:
    """Another draw, ascending: of those that were in no earlier one as long as there are some, the
    rest of all the others."""
    tried = sorted(set().union(*earlier))
    others = np.setdiff1d(np.arange(clients), tried)
    ordered = [*rng.permutation(others), *rng.permutation(tried)]
    return sorted(int(k) for k in ordered[:number])


def stream(seed: int, rows: Ids, start: int, stop: int) -> list[Ids]:
    """What stands from `start` to `stop` in an endless stream of `rows`, shuffled anew each time
    they come; cut where they begin again."""
    parts = []
    for turn in range(start // len(rows), -(-stop // len(rows))):
        shuffled = generator(seed, "stream", turn).permutation(rows)
        first = turn * len(rows)
        parts.append(shuffled[max(start - first, 0) : stop - first])
    return parts


def spread(costs: Mapping[int, int], slots: int) -> list[list[int]]:
    """Clients of each slot, the longest first, each to the slot with the least work so far.

    Graham's longest-processing-time rule: at most 4/3 of the best makespan. Costs are counts
    (tokens), never measured times, so every rank computes the same.
    """
    loads = [0] * slots
    lanes: list[list[int]] = [[] for _ in range(slots)]
    for client in sorted(costs, key=lambda k: (-costs[k], k)):
        lane = loads.index(min(loads))
        lanes[lane].append(client)
        loads[lane] += costs[client]
    return lanes
