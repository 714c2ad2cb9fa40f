"""A round, and what a client did in it."""

from dataclasses import dataclass

import torch

from hpcfed.adapters.layout import Part
from hpcfed.policies.sharing import Split


@dataclass(frozen=True)
class Round:
    """number: from 0. warm: all is shared, and nothing of the method acts yet. clients: the sampled
    ones. split: which values are shared, personal, frozen."""

    number: int
    warm: bool
    clients: tuple[int, ...]
    split: Split

    @property
    def shared(self) -> Part:
        """What is trained, and travels."""
        return self.split.shared

    @property
    def personal(self) -> Part:
        """What is trained, and stays with its client."""
        return self.split.personal


@dataclass
class Outcome:
    """What one client did in one round; `values` (layout.size,) is None if it failed."""

    values: torch.Tensor | None = None
    reason: str = ""  # why it failed
    loss_sum: float = 0.0  # this rank's part of it
    samples: int = 0  # trained on
    tokens: int = 0  # of them, without padding
    steps: int = 0
    scored: int = 0  # sample passes spent on difficulties before training
    density: float = 1.0  # fraction of its personal values that trained
    importance: torch.Tensor | None = None  # (layout.size,) how much its values matter
    gradient: torch.Tensor | None = None  # (layout.size,) mean over its steps, for SCAFFOLD
    score_seconds: float = 0.0  # of the pass that took them
