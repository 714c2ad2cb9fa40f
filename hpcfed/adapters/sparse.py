"""Some values of a frozen weight train, as SLoRA's first stage has it (Babakniya et al. 2023):

W x + D x, D zero but for a share of its entries, drawn once, the same for every client and run.

What is trained, sent, committed and sharded are those entries alone, one vector for each matrix; D
is whole for as long as its layer is passed, forward and backward. The server makes LoRA of it
(hpcfed.server.stages), and from then on it is zero.
"""

from functools import partial
from typing import Any

import torch
from torch import nn

from hpcfed.adapters.base import Trainable, full_shape, zero
from hpcfed.adapters.layout import SPARSE
from hpcfed.rng import generator
from hpcfed.settings.config import Adapter


def places(name: str, out: int, width: int, share: float) -> torch.Tensor:
    """(n,) the entries of a matrix (out, width) that train, ascending, as row * width + column.
    name: of LoRA's A beside it."""
    count = max(1, round(share * out * width))
    drawn = generator(0, "sparse", name).choice(out * width, count, replace=False)
    return torch.from_numpy(drawn).sort().values


class Sparse(nn.Module):
    """D x."""

    index: torch.Tensor

    def __init__(self, index: torch.Tensor, out: int, width: int, like: torch.Tensor) -> None:
        super().__init__()
        self.out, self.width = out, width
        self.weight = nn.Parameter(torch.zeros(len(index), dtype=like.dtype, device=like.device))
        self.register_buffer("index", index.to(like.device), persistent=False)

    def dense(self) -> torch.Tensor:
        """D (out, width)."""
        flat = self.weight.new_zeros(self.out * self.width)
        return flat.scatter(0, self.index, self.weight).view(self.out, self.width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., width) to (..., out)."""
        return nn.functional.linear(hidden.to(self.weight.dtype), self.dense())


def beneath(wrapped: nn.Module, factors: list[Trainable], adapter: Adapter) -> list[Trainable]:
    """Put sparse values under each layer that has these factors of LoRA, where the adapter has
    some."""
    found = []
    names = {id(parameter): name for name, parameter in wrapped.named_parameters()}
    for trainable in factors if adapter.sparse else ():
        if trainable.role != "A":
            continue
        place = names[id(trainable.parameter)].partition(".lora_A.")[0]
        layer: Any = wrapped.get_submodule(place)
        _, width = full_shape(trainable.parameter)
        out, _ = full_shape(layer.lora_B["default"].weight)
        index = places(trainable.name, out, width, adapter.sparse)
        sparse = Sparse(index, out, width, trainable.parameter)
        layer.add_module("sparse", sparse)
        layer.register_forward_hook(partial(_add, sparse))
        name = trainable.name.replace("lora_A", SPARSE)
        found.append(Trainable(trainable.block, SPARSE, name, sparse.weight, sparse, zero))
    return found


def _add(sparse: Sparse, layer: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output + sparse(args[0]).to(output.dtype)
