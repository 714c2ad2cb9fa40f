"""FedAdam and FedYogi (Reddi et al. 2021):

u' = b u + (1-b) Delta;  w' = w - lr u' / (sqrt(r') + tau)
r' = b2 r + (1-b2) Delta^2 (Adam), r - (1-b2) Delta^2 sign(r - Delta^2) (Yogi)
"""

import torch

from hpcfed.adapters.layout import Part
from hpcfed.server.memory import Memory
from hpcfed.settings.config import Config


class Adaptive:
    """A step that each value's second moment scales."""

    def __init__(self, config: Config, memory: Memory) -> None:
        self._spec, self._memory = config.server, memory

    def step(
        self, shared: Part, w: torch.Tensor, wbar: torch.Tensor, control: torch.Tensor
    ) -> torch.Tensor:
        """(n,) the next values."""
        spec, memory, delta = self._spec, self._memory, w - wbar
        u = spec.momentum * memory.get("momentum", shared) + (1 - spec.momentum) * delta
        start = spec.tau**2
        r = memory.get("second", shared, start)
        square = delta.square()
        if spec.optimizer == "adam":
            r = spec.beta2 * r + (1 - spec.beta2) * square
        else:
            r = r - (1 - spec.beta2) * square * (r - square).sign()
        memory.set("momentum", shared, u)
        memory.set("second", shared, r, start)
        return w - memory.rate() * u / (r.sqrt() + spec.tau)
