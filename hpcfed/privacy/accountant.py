"""What a run's releases add up to, by Google's dp-accounting (privacy loss distributions).

Neighbours differ by one whole client, added or removed. A round is the Gaussian mechanism on
clients that were drawn by Poisson sampling; the server's step and all that follows is made of its
output alone.
"""

import functools
import importlib.util
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hpcfed.errors import UserError
from hpcfed.settings.config import Config

STEP = 1e-3  # to which z is solved, upwards
LEAST, MOST = 100, 1_000_000  # of steps
FINEST, POINTS = -4, 5e4  # of the grid: a power of ten, and how many it may have
COARSER = 10.0
LIBRARY = "dp_accounting"


def check_installed() -> None:
    """Raises UserError without the library."""
    if importlib.util.find_spec(LIBRARY) is None:
        raise UserError(
            "privacy needs the library dp-accounting, which is not installed: "
            "pip install 'hpcfed[dp]'."
        )


def interval(noise: float) -> float:
    """Of the grid that privacy losses are put on, a power of ten: at most some 50,000 points in
    each direction, which more noise needs fewer of. On any grid the result is an upper bound."""
    reach = 9 / noise + 0.5 / noise**2
    return float(10.0 ** max(FINEST, math.ceil(math.log10(reach / POINTS))))


@functools.lru_cache(maxsize=64)
def _loss(rate: float, noise: float, grid: float) -> Any:
    """The privacy loss distribution of one release, by the library."""
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=noise, sampling_prob=rate, use_connect_dots=True,
        value_discretization_interval=grid,
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def epsilon(rate: float, noise: float, releases: int, delta: float, coarser: float = 1.0) -> float:
    """After so many releases, from above. rate: of Poisson sampling. noise: z, its deviation over
    the sensitivity. coarser: how many times the usual grid, for a first look."""
    if not releases:
        return 0.0
    loss = _loss(rate, noise, interval(noise) * coarser)
    return float(loss.self_compose(releases).get_epsilon_for_delta(delta))


def solve(rate: float, releases: int, wanted: float, delta: float) -> float:
    """The least z, a multiple of STEP, for which so many releases cost at most `wanted`.

    Raises UserError if no noise in reach is enough.
    """

    def roughly(steps: int) -> float:
        return epsilon(rate, steps * STEP, releases, delta, COARSER)

    def cost(steps: int) -> float:
        return epsilon(rate, steps * STEP, releases, delta)

    rough = _bracket(roughly, wanted)
    low, high = rough or _bracket(cost, wanted) or (0, 0)
    if not high:
        raise UserError(
            f"privacy.epsilon={wanted:g} at privacy.delta={delta:g} is out of reach: no noise up "
            f"to {MOST * STEP:g} is enough for {releases} rounds; allow more, or plan fewer."
        )
    if rough:
        # The rough bound is the larger one, so that z is this or less: epsilon falls at least as
        # fast as 1 / z does.
        low = high = _least(roughly, wanted, low, high)
        while low > LEAST and cost(low) <= wanted:
            high, low = low, max(LEAST, min(low - 1, int(low * cost(low) / wanted)))
        while cost(high) > wanted:
            low, high = high, high + 1
    return (low if cost(low) <= wanted else _least(cost, wanted, low, high)) * STEP


def _bracket(cost: Callable[[int], float], wanted: float) -> tuple[int, int] | None:
    """Numbers of which the second costs at most `wanted`, and the first more, unless it is LEAST;
    None if none up to MOST does."""
    low, high = MOST // 4, MOST  # from above, where the library is fast
    if cost(high) > wanted:
        return None
    while low > LEAST and cost(low) <= wanted:
        low, high = max(LEAST, low // 4), low
    return low, high


def _least(cost: Callable[[int], float], wanted: float, low: int, high: int) -> int:
    """The least whole number in (low, high] that costs at most `wanted`; high does. Log cost over
    log number is all but straight, so that this interpolates, and bisects every third time."""
    for turn in itertools.count(1):
        if high - low <= 1:
            break
        share = 0.5
        if turn % 3 and cost(high) < wanted < cost(low):
            share = math.log(cost(low) / wanted) / math.log(cost(low) / cost(high))
        middle = math.ceil(low * (high / low) ** share)
        middle = min(high - 1, max(low + 1, middle))
        if cost(middle) > wanted:
            low = middle
        else:
            high = middle
    return high


def most(cost: Callable[[int], float], rounds: int, budget: float) -> int:
    """How many of so many rounds cost at most the budget; cost: of that many, growing."""
    if cost(rounds) <= budget:
        return rounds
    low, high = 0, rounds
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    return low


def ends_early(config: Config, rounds: int) -> str:
    """Why a run ends after so many of federation.rounds; "" if it has all."""
    planned = config.federation.rounds
    if rounds == planned:
        return ""
    return (
        f"privacy.epsilon={config.privacy.epsilon:g} allows {rounds} of the {planned} rounds: the "
        "run ends before the round that would cost more"
    )


@dataclass(frozen=True)
class Terms:
    """What a run's privacy rests on. rate: q of Poisson sampling; noise: z."""

    rate: float
    noise: float
    delta: float

    def epsilon(self, rounds: int) -> float:
        """After so many rounds."""
        return epsilon(self.rate, self.noise, rounds, self.delta)

    def fitting(self, rounds: int, budget: float | None) -> int:
        """How many of so many rounds cost at most the budget; None: all."""
        return rounds if budget is None else most(self.epsilon, rounds, budget)


def terms(config: Config, clients: int) -> Terms:
    """Of a configuration with privacy, and so many clients. Solves for the noise if only a budget
    is given. Raises UserError if the budget is spent before the method has had a round."""
    spec, rounds = config.privacy, config.federation.rounds
    rate = config.federation.per_round / clients
    if spec.noise is None:
        assert spec.epsilon is not None
        return Terms(rate, solve(rate, rounds, spec.epsilon, spec.delta), spec.delta)
    found, warmup = Terms(rate, spec.noise, spec.delta), config.curriculum.warmup
    if found.fitting(warmup + 1, spec.epsilon) <= warmup:
        first = "one round" if not warmup else f"the warm-up and one round ({warmup + 1})"
        raise UserError(
            f"{first} at privacy.noise={spec.noise:g} cost epsilon {found.epsilon(warmup + 1):.3g},"
            f" more than privacy.epsilon={spec.epsilon:g}: give more noise, or leave privacy.noise "
            "out to have it solved for."
        )
    return found
