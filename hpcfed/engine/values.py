"""The trained values in a slot's DeepSpeed engine: written and read whole, at every ZeRO stage."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from hpcfed.adapters.layout import AdapterLayout, Part
from hpcfed.cluster.topology import Topology


class Values:
    """Master copy and working copy of the parameters. Every method is collective over the slot."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        residual: Sequence[nn.Parameter],
        layout: AdapterLayout,
        stage: int,
        topology: Topology,
    ) -> None:
        """parameters, residual: of the layout's trained entries, and of the others."""
        self._parameters, self._layout = parameters, layout
        self._residual, self._held = residual, torch.zeros(layout.residual.size)
        self._stage, self._topology = stage, topology

    def shaped(self, vector: torch.Tensor) -> list[torch.Tensor]:
        """A vector (layout.size,) as the trained parameters are shaped, on the device."""
        return self._cut(vector, self._layout.trained)

    def _cut(self, vector: torch.Tensor, part: Part) -> list[torch.Tensor]:
        there = vector.to(self._topology.device)  # one copy, whatever the number of parameters
        return [there[entry.values].reshape(entry.shape).clone() for entry in part.entries]

    def place(self, vector: torch.Tensor) -> None:
        """Make the residual that of `vector` (layout.size,): frozen, so it has no master copy."""
        if not self._residual:
            return
        self._held = self._layout.residual.pack(vector).clone()
        values = self._cut(vector, self._layout.residual)
        with self._whole(self._residual):
            for parameter, value in zip(self._residual, values, strict=True):
                parameter.data.copy_(value)

    def _whole(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
        """Parameters that ZeRO-3 has partitioned, whole meanwhile; what is written is kept."""
        if self._stage < 3:
            return nullcontext()
        import deepspeed

        gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
            list(parameters), modifier_rank=0
        )
        return gathered

    def write(self, vector: torch.Tensor) -> None:
        """Make master and working copy of what trains equal `vector` (layout.size,)."""
        if self._stage == 3:
            self._write_partitioned(self.shaped(vector))
        else:
            self._write_replicated(self.shaped(vector))

    def _write_replicated(self, values: list[torch.Tensor]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param

        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.data.copy_(value)
            if self._stage > 0:
                safe_set_full_fp32_param(parameter, value)

    def _write_partitioned(self, values: list[torch.Tensor]) -> None:
        from deepspeed.utils import safe_set_local_fp32_param

        rank, ranks = self._topology.rank_in_slot, self._topology.ranks_per_client
        for parameter, value in zip(self._parameters, values, strict=True):
            # Each rank holds ceil(n / ranks) values; the last one's partition may be padding.
            part = -(-value.numel() // ranks)
            padded = nn.functional.pad(value.flatten(), (0, part * ranks - value.numel()))
            safe_set_local_fp32_param(parameter, padded.narrow(0, part * rank, part))
        with self._whole(self._parameters):
            for parameter, value in zip(self._parameters, values, strict=True):
                parameter.data.copy_(value)

    def read(self, from_master: bool) -> torch.Tensor:
        """(layout.size,) fp32 on the CPU, the same on all ranks of the slot."""
        from deepspeed.utils import safe_get_full_fp32_param

        vector = torch.empty(
            self._layout.size, dtype=torch.float32, device=self._topology.device
        )  # copied to the host at once
        self._layout.residual.unpack(self._held.to(vector.device), vector)
        for entry, parameter in zip(self._layout.trained.entries, self._parameters, strict=True):
            value = safe_get_full_fp32_param(parameter) if from_master else parameter.data
            vector[entry.values] = value.detach().flatten()[: entry.size].float()
        return vector.cpu()
