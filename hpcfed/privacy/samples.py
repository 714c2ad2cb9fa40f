"""What DP-SGD inside clients adds up to: neighbours differ by one training row of one client.

A client draws each step's rows by Poisson sampling, at a rate of its own, and its steps compose;
other clients' steps do not touch the row. Which clients take part in a round is public, and so is
how many rows each has. A client that failed counts as one that made its steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hpcfed.errors import UserError
from hpcfed.policies.sampling import sample
from hpcfed.privacy import accountant
from hpcfed.settings.config import Config


@dataclass(frozen=True)
class Plan:
    """The steps of all clients. rows: (clients,) how many each trains on."""

    config: Config
    rows: tuple[int, ...]

    def rate(self, client: int) -> float:
        """With which each of its rows is in a step, so that local.batch_size are on average."""
        return min(1.0, self.config.local.batch_size / self.rows[client])

    def expected(self, client: int) -> float:
        """Rows of a step on average: the fixed denominator."""
        return self.rate(client) * self.rows[client]

    def steps(self, client: int) -> int:
        """Of one round: as many as make local.epochs on average, at most local.max_steps."""
        local = self.config.local
        epoch = -(-self.rows[client] // local.batch_size)
        return min(local.epochs * epoch, local.max_steps or local.epochs * epoch)

    @cached_property
    def _rounds(self) -> tuple[tuple[int, ...], ...]:
        spec = self.config.federation
        return tuple(
            tuple(sample(self.config.seed, t, len(self.rows), spec.per_round))
            for t in range(spec.rounds)
        )

    def cases(self, rounds: int) -> list[tuple[float, int]]:
        """(rate, steps) after so many rounds, of the clients that may have lost most: any other has
        a rate and steps that are no greater than those of one of these."""
        times = np.bincount(
            np.array([k for own in self._rounds[:rounds] for k in own], dtype=np.int64),
            minlength=len(self.rows),
        )
        pairs = {(self.rate(k), int(n) * self.steps(k)) for k, n in enumerate(times) if n}
        found: list[tuple[float, int]] = []
        for rate, steps in sorted(pairs, reverse=True):
            if not found or steps > found[-1][1]:
                found.append((rate, steps))
        return found

    def epsilon(self, rounds: int, noise: float) -> float:
        """Of the row that may have lost most, after so many rounds. noise: z."""
        return worst(self.cases(rounds), noise, self.config.privacy.delta)

    def noise(self) -> float:
        """z, as configured, or the least one with which all rounds cost privacy.epsilon at most.
        Raises UserError if the budget is too small for a round, or for any noise."""
        spec, rounds = self.config.privacy, self.config.federation.rounds
        if spec.noise is None:
            assert spec.epsilon is not None
            cases = self.cases(rounds)
            return max(accountant.solve(*case, spec.epsilon, spec.delta) for case in cases)
        first = self.config.curriculum.warmup + 1
        if spec.epsilon is not None and self.epsilon(first, spec.noise) > spec.epsilon:
            raise UserError(
                f"the first {first} rounds at privacy.noise={spec.noise:g} cost epsilon "
                f"{self.epsilon(first, spec.noise):.3g}, more than privacy.epsilon="
                f"{spec.epsilon:g}: give more noise, or leave privacy.noise out to have it solved "
                "for."
            )
        return spec.noise

    def fitting(self, noise: float) -> int:
        """How many of federation.rounds cost privacy.epsilon at most; without one, all."""
        spec, rounds = self.config.privacy, self.config.federation.rounds
        if spec.epsilon is None or spec.noise is None:  # noise that was solved for is enough
            return rounds
        budget = spec.epsilon
        return accountant.most(lambda t: self.epsilon(t, noise), rounds, budget)


def worst(cases: Sequence[tuple[float, int]], noise: float, delta: float) -> float:
    """Epsilon of the case that costs most. cases: (rate, steps)."""
    return max((accountant.epsilon(q, noise, t, delta) for q, t in cases), default=0.0)
