"""Client-level differential privacy in the round loop (DP-FedAvg, McMahan et al. 2018).

Clients are drawn by Poisson sampling; each update is clipped over all that the client sends; all
weigh the same, and the sum is divided by q K, however many came through; noise is added once, to
the sums of the first slot, before they are exchanged. The key that both come from is known to the
ranks of that slot alone.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch

from hpcfed.cluster.collectives import MaskedSum
from hpcfed.cluster.topology import Topology
from hpcfed.data.partition import ClientRows
from hpcfed.errors import UserError
from hpcfed.privacy import mechanism, streams
from hpcfed.privacy.accountant import Terms, ends_early, terms
from hpcfed.rounds import ledger
from hpcfed.settings.config import Config
from hpcfed.settings.counts import BY_CLIENT, BY_SAMPLE
from hpcfed.state import PrivacyState


def begin(config: Config, rows: list[ClientRows]) -> tuple[PrivacyState, bytes]:
    """Of a new run, on one rank: its state, which holds the noise that was solved for, and its key.
    Raises UserError if the budget is too small for any."""
    spec = config.privacy
    key = os.urandom(streams.KEY_BYTES) if spec.secret else streams.public_key(config.seed)
    clip = mechanism.START if spec.clip == "adaptive" else spec.clip
    by_sample = BY_SAMPLE.holds(config)
    noise = ledger.plan(config, rows).noise() if by_sample else terms(config, len(rows)).noise
    return PrivacyState(noise, clip, streams.digest(key)), key


def check_key(state: PrivacyState, key: bytes) -> None:
    """Raises UserError unless it is the key that the run began with."""
    if streams.digest(key) != state.key:
        raise UserError(
            "The run's secret key is not the one that it began with; put that back, or give "
            "another run directory with output=..."
        )


@dataclass
class Guard:
    """What privacy asks of each round, on all ranks. key: None on ranks of other slots than the
    first. rounds: that the budget allows, of those that are planned."""

    config: Config
    clients: int
    topology: Topology
    state: PrivacyState
    key: bytes | None
    rounds: int

    def __post_init__(self) -> None:
        spec, expected = self.config.privacy, self.config.federation.per_round
        self.terms = Terms(expected / self.clients, self.state.noise, spec.delta)
        self._expected = float(expected)
        adaptive = spec.clip == "adaptive"
        self._adaptive = mechanism.Adaptive.of(self.state.noise, expected) if adaptive else None
        self.extra = int(adaptive)  # values that travel beside the update
        self._used = self.state.clip

    def sample(self, round_number: int) -> list[int]:
        """The clients of a round, ascending; there may be none. Collective over the world."""
        drawn = None
        if self.topology.is_root:
            assert self.key is not None
            rate = self.terms.rate
            drawn = streams.coins(self.key, "sample", round_number, self.clients, rate)
        sampled: list[int] = self.topology.world.comm.bcast(drawn)
        return sampled

    def message(self, update: torch.Tensor) -> torch.Tensor:
        """(n + extra,) what a client adds to the sums, of its update (n,)."""
        units, within = mechanism.clipped(update, self.state.clip)
        if self._adaptive is None:
            return units
        return torch.cat([units, units.new_tensor([self._adaptive.bit(within)])])

    def close(self, sums: MaskedSum, round_number: int) -> None:
        """The slot's sums before they are exchanged: noise, and the fixed denominator, which the
        first slot brings."""
        sums.weights[:] = 0
        if self.topology.slot_index:
            return
        assert self.key is not None
        clip, adaptive, size = self.state.clip, self._adaptive, sums.size - self.extra
        deviation = self.state.noise if adaptive is None else adaptive.raised(self.state.noise)
        sums.sums[:size] += mechanism.noise(self.key, round_number, size, deviation, clip)
        if adaptive is not None:
            sums.sums[size:] += adaptive.noise(self.key, round_number)
        sums.weights[:] = self._expected / mechanism.unit(clip)

    def open(self, mean: torch.Tensor) -> torch.Tensor:
        """(n,) the noised mean update, of what came out of the exchange; the next round's norm."""
        self._used = clip = self.state.clip
        if self._adaptive is None:
            return mean
        total = float(mean[-1]) * self._expected / mechanism.unit(clip)
        self.state.clip = self._adaptive.next(clip, total, self._expected)
        return mean[:-1]

    @property
    def ends_early(self) -> str:
        """Why the run ends before federation.rounds; "" if it does not."""
        return ends_early(self.config, self.rounds)

    def record(self, rounds: int) -> dict[str, Any]:
        """For a round's metrics, on the rank that writes them."""
        if not self.topology.is_root:
            return {}
        return {"epsilon": self.terms.epsilon(rounds), "clip": self._used}

    def summary(self, rounds: int) -> dict[str, Any]:
        """For summary.json, likewise."""
        if not self.topology.is_root:
            return {}
        return {
            "unit": self.config.privacy.unit,
            "epsilon": self.terms.epsilon(rounds),
            "budget": self.config.privacy.epsilon,
            "ended_early": self.ends_early or None,
            "delta": self.terms.delta,
            "noise": self.terms.noise,
            "rate": self.terms.rate,
            "clip": self.state.clip,
            "secret": self.config.privacy.secret,
        }


def build(
    config: Config,
    clients: int,
    topology: Topology,
    state: PrivacyState | None,
    key: bytes | None,
) -> Guard | None:
    """None without client-level privacy. key: on the first rank. Collective over the world."""
    if not BY_CLIENT.holds(config):
        return None
    assert state is not None
    planned, spec = config.federation.rounds, config.privacy
    rounds = None
    if topology.is_root:
        # Noise that was solved for is enough for all rounds, by a bound as tight as that.
        budget = None if spec.noise is None else spec.epsilon
        found = Terms(config.federation.per_round / clients, state.noise, spec.delta)
        rounds = found.fitting(planned, budget)
    rounds = topology.world.comm.bcast(rounds)
    if topology.slot_index == 0:
        key = topology.slot.bcast(key)
    own = key if topology.slot_index == 0 else None
    return Guard(config, clients, topology, state, own, rounds)
