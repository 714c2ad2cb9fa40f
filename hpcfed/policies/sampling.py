"""Which clients take part in a round, and which slot runs which of them."""

from collections.abc import Mapping

from hpcfed.rng import generator


def sample(seed: int, round_number: int, clients: int, per_round: int) -> list[int]:
    """Clients of a round, uniformly without replacement, ascending."""
    rng = generator(seed, "sample", round_number)
    return sorted(int(k) for k in rng.choice(clients, per_round, replace=False))


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
