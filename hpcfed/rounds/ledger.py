"""Sample-level differential privacy in the round loop: DP-SGD inside each client.

Rows of a step, and its noise, come from a key that every rank knows, by client, round and step, so
they are the same on any number of slots, and after a resumption. All that leaves a client is made
of noised gradients, so that weights, transforms and the server are as without privacy.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hpcfed.cluster.topology import Topology
from hpcfed.data.batches import Ids
from hpcfed.data.partition import ClientRows
from hpcfed.engine.dpsgd import Release
from hpcfed.privacy import streams
from hpcfed.privacy.accountant import ends_early
from hpcfed.privacy.samples import Plan
from hpcfed.settings.config import Config
from hpcfed.settings.counts import BY_SAMPLE
from hpcfed.state import PrivacyState


def plan(config: Config, rows: list[ClientRows]) -> Plan:
    """Of a configuration's clients."""
    return Plan(config, tuple(len(own.train) for own in rows))


@dataclass
class Ledger:
    """What sample-level privacy asks of each client, on all ranks. rounds: that the budget allows,
    of those that are planned."""

    plan: Plan
    topology: Topology
    state: PrivacyState
    key: bytes
    rounds: int

    @property
    def ends_early(self) -> str:
        """Why the run ends before federation.rounds; "" if it does not."""
        return ends_early(self.plan.config, self.rounds)

    def batches(self, client: int, round_number: int, rows: Ids) -> list[Ids]:
        """The rows of each step: every row by itself, with the client's rate; there may be none."""
        rate, steps = self.plan.rate(client), self.plan.steps(client)
        purpose = f"rows/{client}/{round_number}"
        return [
            rows[np.array(streams.coins(self.key, purpose, step, len(rows), rate), dtype=np.int64)]
            for step in range(steps)
        ]

    def release(self, client: int, round_number: int, rows: Ids) -> Release:
        """How the client's steps are clipped and noised."""
        purpose = f"noise/{client}/{round_number}"
        clip = self.state.clip

        def noise(step: int, size: int) -> torch.Tensor:
            drawn = streams.normals(self.key, purpose, step, size)
            return torch.from_numpy(drawn * (self.state.noise * clip))

        return Release(clip, self.plan.expected(client), noise, rows[:1])

    def record(self, rounds: int) -> dict[str, Any]:
        """For a round's metrics, on the rank that writes them."""
        if not self.topology.is_root:
            return {}
        return {"epsilon": self.plan.epsilon(rounds, self.state.noise), "clip": self.state.clip}

    def summary(self, rounds: int) -> dict[str, Any]:
        """For summary.json, likewise."""
        if not self.topology.is_root:
            return {}
        spec = self.plan.config.privacy
        return {
            "unit": spec.unit,
            "epsilon": self.plan.epsilon(rounds, self.state.noise),
            "budget": spec.epsilon,
            "ended_early": self.ends_early or None,
            "delta": spec.delta,
            "noise": self.state.noise,
            "worst": [list(case) for case in self.plan.cases(rounds)],
            "clip": self.state.clip,
            "secret": spec.secret,
        }


def build(
    config: Config,
    rows: list[ClientRows],
    topology: Topology,
    state: PrivacyState | None,
    key: bytes | None,
) -> Ledger | None:
    """None without sample-level privacy. key: on the first rank. Collective over the world."""
    if not BY_SAMPLE.holds(config):
        return None
    assert state is not None
    planned, comm = plan(config, rows), topology.world.comm
    rounds = comm.bcast(planned.fitting(state.noise) if topology.is_root else None)
    return Ledger(planned, topology, state, comm.bcast(key), rounds)
