"""What training passes tell about their samples."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from hpcfed.adapters.layout import AdapterLayout
from hpcfed.cluster.collectives import sum_in_slot
from hpcfed.cluster.topology import Topology
from hpcfed.data.batches import Floats, Ids
from hpcfed.importance.fisher import FisherSums, PerSampleGradients


class Observer:
    """What training passes tell about the samples, on one rank. owners: modules with trained
    values -> their entries. rows: of all tokens."""

    def __init__(
        self,
        layout: AdapterLayout,
        owners: Mapping[nn.Module, list[int]],
        taps: PerSampleGradients,
        topology: Topology,
        rows: int,
    ) -> None:
        self._layout, self._owners = layout, owners
        self._taps, self._topology = taps, topology
        axes = [layout.entries[indices[0]].neuron_axis for indices in owners.values()]
        self._sums = FisherSums(axes, topology.device)
        self._losses, self._fisher = np.zeros(rows), np.zeros(rows)
        # What happened, in order, to be read from the device at once: rows, and their losses and
        # traces (2, rows); None where they are forgotten.
        self._events: list[tuple[Ids, torch.Tensor | None]] = []

    def forget(self, batch: Ids) -> None:
        """These rows are about to be trained on, on some rank."""
        self._events.append((batch, None))

    def begin(self, rows: int, scale: float) -> None:
        """Before the forward of this many rows, whose losses enter with this factor."""
        self._sums.batch(max(rows, 1), scale)
        self._taps.listen(self._sums)

    def end(self, rows: Ids, losses: torch.Tensor) -> None:
        """After the backward."""
        told = torch.stack([losses.detach().double(), self._sums.trace.double()])
        self._events.append((rows, told))

    def whole(self, rows: Ids, samples: int) -> tuple[Floats, Floats, torch.Tensor]:
        """Added up over the ranks of the slot: losses, Fisher traces, mean Fisher per neuron."""
        layout = self._layout
        self._replay()
        neurons = torch.zeros(layout.neurons[-1].stop)
        for total, indices in zip(self._sums.neurons, self._owners.values(), strict=True):
            if total is not None:
                neurons[layout.neurons[indices[0]]] = total.cpu() / samples
        whole = np.concatenate([self._losses[rows], self._fisher[rows], neurons.double().numpy()])
        whole = sum_in_slot(whole, self._topology)
        self._losses[rows], self._fisher[rows] = (
            whole[: len(rows)],
            whole[len(rows) : 2 * len(rows)],
        )
        return self._losses, self._fisher, torch.from_numpy(whole[2 * len(rows) :]).float()

    def _replay(self) -> None:
        kept = [told for _, told in self._events if told is not None]
        table = torch.cat(kept, dim=1).cpu().numpy() if kept else np.zeros((2, 0))
        start = 0
        for rows, told in self._events:
            if told is None:
                self._losses[rows] = self._fisher[rows] = 0
            else:
                stop = start + len(rows)
                self._losses[rows], self._fisher[rows] = table[:, start:stop]
                start = stop
        self._events.clear()
