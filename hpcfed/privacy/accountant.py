"""What a run's releases add up to, by Google's dp-accounting (privacy loss distributions).

Neighbours differ by one whole client, added or removed. A round is the Gaussian mechanism on
clients that were drawn by Poisson sampling; the server's step and all that follows is made of its
output alone.
"""

import functools
import importlib.util
from dataclasses import dataclass
from typing import Any

from hpcfed.errors import UserError
from hpcfed.settings.config import Config

STEP = 1e-3  # to which z is solved, upwards
MOST_NOISE = 1000.0
LIBRARY = "dp_accounting"


def check_installed() -> None:
    """Raises UserError without the library."""
    if importlib.util.find_spec(LIBRARY) is None:
        raise UserError(
            "privacy needs the library dp-accounting, which is not installed: "
            "pip install 'hpcfed[dp]'."
        )


@functools.lru_cache(maxsize=64)
def _loss(rate: float, noise: float) -> Any:
    """The privacy loss distribution of one release."""
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=noise, sampling_prob=rate, use_connect_dots=True
    )


def epsilon(rate: float, noise: float, releases: int, delta: float) -> float:
    """After so many releases. rate: of Poisson sampling. noise: z, its deviation over the
    sensitivity."""
    if not releases:
        return 0.0
    return float(_loss(rate, noise).self_compose(releases).get_epsilon_for_delta(delta))


def solve(rate: float, releases: int, wanted: float, delta: float) -> float:
    """The least z, a multiple of STEP, for which so many releases cost at most `wanted`.

    Raises UserError if no noise in reach is enough.
    """
    low, high = 0, 1000  # in steps; low costs too much
    while epsilon(rate, high * STEP, releases, delta) > wanted:
        low, high = high, 2 * high
        if high * STEP > MOST_NOISE:
            raise UserError(
                f"privacy.epsilon={wanted:g} at privacy.delta={delta:g} is out of reach: no noise "
                f"up to {MOST_NOISE:g} is enough for {releases} rounds; allow more, or plan fewer."
            )
    while high - low > 1:
        middle = (low + high) // 2
        if epsilon(rate, middle * STEP, releases, delta) > wanted:
            low = middle
        else:
            high = middle
    return high * STEP


@dataclass(frozen=True)
class Terms:
    """What a run's privacy rests on. rate: q of Poisson sampling; noise: z."""

    rate: float
    noise: float
    delta: float

    def epsilon(self, rounds: int) -> float:
        """After so many rounds."""
        return epsilon(self.rate, self.noise, rounds, self.delta)


def terms(config: Config, clients: int) -> Terms:
    """Of a configuration with privacy, and so many clients. Solves for the noise if only a budget
    is given. Raises UserError if the rounds cost more than the budget."""
    spec, rounds = config.privacy, config.federation.rounds
    rate = config.federation.per_round / clients
    if spec.noise is None:
        assert spec.epsilon is not None
        return Terms(rate, solve(rate, rounds, spec.epsilon, spec.delta), spec.delta)
    found = Terms(rate, spec.noise, spec.delta)
    if spec.epsilon is not None and found.epsilon(rounds) > spec.epsilon:
        low, high = 0, rounds
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if found.epsilon(middle) <= spec.epsilon else (low, middle)
        raise UserError(
            f"{rounds} rounds at privacy.noise={spec.noise:g} cost epsilon "
            f"{found.epsilon(rounds):.3g}, more than privacy.epsilon={spec.epsilon:g}; "
            + (f"{low} fit in it: set federation.rounds={low}, or give" if low else "not one fits "
               "in it: give")
            + " more noise, or leave privacy.noise out to have it solved for."
        )  # fmt: skip
    return found
