"""Freezing single values inside a ZeRO engine, bit for bit, at every stage.

A masked value is absent: its gradient is zero before accumulation and before the norm for clipping
(a hook on the parameter, before DeepSpeed sees the gradient), so its moments stay zero; and what
the optimizer does regardless (weight decay) is undone after each of its steps, in the fp32 master
partition that it works on.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


class Freezer:
    """Hooks on the parameters and the torch optimizer of one engine."""

    def __init__(self, parameters: Sequence[nn.Parameter], engine: Any, stage: int) -> None:
        self._engine = engine
        self._stage = stage
        self._absent: list[torch.Tensor] = []  # a parameter's frozen values, in its full shape
        self._frozen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # id of a master -> ...
        for index, parameter in enumerate(parameters):
            parameter.register_hook(self._gradient_hook(index))  # type: ignore[no-untyped-call]
        self._base = getattr(engine.optimizer, "optimizer", engine.optimizer)
        self._base.register_step_post_hook(self._restore)

    def masters(self) -> list[torch.Tensor]:
        """The fp32 tensors that the torch optimizer steps on: flat partitions from stage 1 on."""
        if self._stage == 3:  # the torch optimizer is lent one at a time
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return [p for group in self._base.param_groups for p in group["params"]]

    def release(self) -> None:
        """Nothing is frozen."""
        self._absent, self._frozen = [], {}

    def freeze(self, absent: Sequence[torch.Tensor], where: Sequence[torch.Tensor]) -> None:
        """From now on these values stay as they are.

        absent: per parameter, bool in its full shape. where: per master, bool, the same values in
        the master's own order. Call with the values to keep in the engine.
        """
        self._absent = list(absent)
        self._frozen = {
            id(master): (mask, master.detach().clone())
            for master, mask in zip(self.masters(), where, strict=True)
        }

    def _gradient_hook(self, index: int) -> Any:
        def hook(gradient: torch.Tensor) -> torch.Tensor | None:
            return gradient.masked_fill(self._absent[index], 0) if self._absent else None

        return hook

    def _restore(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not self._frozen:
            return
        for group in optimizer.param_groups:
            for master in group["params"]:
                mask, values = self._frozen[id(master)]
                master.data.copy_(torch.where(mask, values, master.data))
