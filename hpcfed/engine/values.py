"""The trained values in a slot's DeepSpeed engine: written and read whole, at every ZeRO stage."""

from collections.abc import Sequence

import torch
from torch import nn

from hpcfed.adapters.layout import AdapterLayout
from hpcfed.cluster.topology import Topology


class Values:
    """Master copy and working copy of the parameters. Every method is collective over the slot."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        layout: AdapterLayout,
        stage: int,
        topology: Topology,
    ) -> None:
        self._parameters, self._layout = parameters, layout
        self._stage, self._topology = stage, topology

    def shaped(self, vector: torch.Tensor) -> list[torch.Tensor]:
        """A vector (layout.size,) as the parameters are shaped, on the device."""
        there = vector.to(self._topology.device)  # one copy, whatever the number of parameters
        return [there[entry.values].reshape(entry.shape).clone() for entry in self._layout.entries]

    def write(self, vector: torch.Tensor) -> None:
        """Make master and working copy equal `vector` (layout.size,)."""
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
        import deepspeed
        from deepspeed.utils import safe_set_local_fp32_param

        rank, ranks = self._topology.rank_in_slot, self._topology.ranks_per_client
        for parameter, value in zip(self._parameters, values, strict=True):
            # Each rank holds ceil(n / ranks) values; the last one's partition may be padding.
            part = -(-value.numel() // ranks)
            padded = nn.functional.pad(value.flatten(), (0, part * ranks - value.numel()))
            safe_set_local_fp32_param(parameter, padded.narrow(0, part * rank, part))
        with deepspeed.zero.GatheredParameters(list(self._parameters), modifier_rank=0):
            for parameter, value in zip(self._parameters, values, strict=True):
                parameter.data.copy_(value)

    def read(self, from_master: bool) -> torch.Tensor:
        """(layout.size,) fp32 on the CPU, the same on all ranks of the slot."""
        from deepspeed.utils import safe_get_full_fp32_param

        vector = torch.empty(
            self._layout.size, dtype=torch.float32, device=self._topology.device
        )  # copied to the host at once
        for entry, parameter in zip(self._layout.entries, self._parameters, strict=True):
            value = safe_get_full_fp32_param(parameter) if from_master else parameter.data
            vector[entry.values] = value.detach().flatten()[: entry.size].float()
        return vector.cpu()
