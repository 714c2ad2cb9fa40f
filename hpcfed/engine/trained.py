"""What local training comes to."""

from dataclasses import dataclass, field

import numpy as np
import torch

from hpcfed.data.batches import Floats, Ids


@dataclass
class Trained:
    """What local training did: loss summed over samples, samples, their tokens without padding, and
    optimizer steps.

    losses, fisher: (len(tokens),) each row's loss and Fisher trace when it was last trained on.
    neurons: mean squared per-sample gradient per neuron, in the layout's order. rows: the rows that
    were trained on, ascending.
    """

    loss_sum: float = 0.0
    samples: int = 0
    steps: int = 0
    tokens: int = 0
    losses: Floats = field(default_factory=lambda: np.zeros(0))
    fisher: Floats = field(default_factory=lambda: np.zeros(0))
    neurons: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    rows: Ids = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def followed_by(self, later: "Trained") -> "Trained":
        """Both, one after the other."""
        samples = self.samples + later.samples
        if not len(self.rows) or not len(later.rows):  # one of them was not observed, or is empty
            seen = later if len(later.rows) else self
            losses, fisher, neurons, rows = seen.losses, seen.fisher, seen.neurons, seen.rows
        else:
            losses, fisher = self.losses.copy(), self.fisher.copy()
            losses[later.rows] = later.losses[later.rows]
            fisher[later.rows] = later.fisher[later.rows]
            neurons = (self.neurons * self.samples + later.neurons * later.samples) / samples
            rows = np.union1d(self.rows, later.rows)
        return Trained(
            self.loss_sum + later.loss_sum, samples, self.steps + later.steps,
            self.tokens + later.tokens, losses, fisher, neurons, rows,
        )  # fmt: skip
