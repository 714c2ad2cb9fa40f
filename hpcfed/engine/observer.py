"""What training passes tell about their samples."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from hpcfed.cluster.collectives import sum_in_slot
from hpcfed.data.batches import Floats, Ids
from hpcfed.importance.fisher import FisherSums

if TYPE_CHECKING:
    from hpcfed.engine.engine import Engine


class Observer:
    """What training passes tell about its samples, on one rank."""

    def __init__(self, engine: "Engine", rows: int) -> None:
        self._engine = engine
        layout = engine.layout
        axes = [layout.entries[indices[0]].neuron_axis for indices in engine.owners.values()]
        self._sums = FisherSums(axes, engine.topology.device)
        self._losses, self._fisher = np.zeros(rows), np.zeros(rows)

    def forget(self, batch: Ids) -> None:
        """These rows are about to be trained on, on some rank."""
        self._losses[batch] = self._fisher[batch] = 0

    def begin(self, rows: int, scale: float) -> None:
        """Before the forward of this many rows, whose losses enter with this factor."""
        self._sums.batch(max(rows, 1), scale)
        self._engine.taps.listen(self._sums)

    def end(self, rows: Ids, losses: torch.Tensor) -> None:
        """After the backward."""
        self._losses[rows] = losses.detach().cpu().numpy()
        self._fisher[rows] = self._sums.trace.cpu().numpy()

    def whole(self, rows: Ids, samples: int) -> tuple[Floats, Floats, torch.Tensor]:
        """Added up over the ranks of the slot: losses, Fisher traces, mean Fisher per neuron."""
        layout = self._engine.layout
        neurons = torch.zeros(layout.neurons[-1].stop)
        for total, indices in zip(self._sums.neurons, self._engine.owners.values(), strict=True):
            if total is not None:
                neurons[layout.neurons[indices[0]]] = total.cpu() / samples
        whole = np.concatenate([self._losses[rows], self._fisher[rows], neurons.double().numpy()])
        whole = sum_in_slot(whole, self._engine.topology)
        self._losses[rows], self._fisher[rows] = (
            whole[: len(rows)],
            whole[len(rows) : 2 * len(rows)],
        )
        return self._losses, self._fisher, torch.from_numpy(whole[2 * len(rows) :]).float()
