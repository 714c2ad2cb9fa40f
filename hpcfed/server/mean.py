"""FedAvg (McMahan et al. 2017): w' = wbar."""

import torch

from hpcfed.adapters.layout import Part
from hpcfed.server.memory import Memory
from hpcfed.settings.config import Config


class Mean:
    """The clients' mean itself."""

    def __init__(self, config: Config, memory: Memory) -> None:
        pass

    def step(
        self, shared: Part, w: torch.Tensor, wbar: torch.Tensor, control: torch.Tensor
    ) -> torch.Tensor:
        """(n,) the next values."""
        return wbar.clone()
