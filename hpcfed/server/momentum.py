"""Momentum on the server: of the pseudo-gradient (FedAvgM, Hsu et al. 2019), or of how it changes
(FedPepTAO's code).

momentum      v' = b v + Delta + control;  w' = w - lr v'
difference    v' = b v + (1-b) (Delta_before - Delta) + control;  w' = wbar - lr v'
"""

import torch

from hpcfed.adapters.layout import Part
from hpcfed.server.memory import Memory
from hpcfed.settings.config import Config


class Momentum:
    """The configured one of the two."""

    def __init__(self, config: Config, memory: Memory) -> None:
        self._beta, self._memory = config.server.momentum, memory
        self._differences = config.server.gradient == "difference"

    def step(
        self, shared: Part, w: torch.Tensor, wbar: torch.Tensor, control: torch.Tensor
    ) -> torch.Tensor:
        """(n,) the next values. control (n,): what makes up for clients that were not sampled."""
        if self._differences:
            return self._difference(shared, w, wbar, control)
        memory, delta = self._memory, w - wbar
        rest = self._beta * memory.get("momentum", shared) + control
        v = rest + delta
        memory.set("momentum", shared, v)
        # w - lr v, written so that without momentum, control and rate it is wbar to the last bit.
        return wbar - rest - (memory.rate() - 1) * v

    def _difference(
        self, shared: Part, w: torch.Tensor, wbar: torch.Tensor, control: torch.Tensor
    ) -> torch.Tensor:
        memory, beta, delta = self._memory, self._beta, w - wbar
        first = not memory.has("delta")
        before = memory.get("delta", shared)
        memory.set("delta", shared, delta)
        if first:  # no server step in the first round
            return wbar.clone()
        v = beta * memory.get("momentum", shared) + (1 - beta) * (before - delta) + control
        memory.set("momentum", shared, v)
        return wbar - memory.rate() * v
