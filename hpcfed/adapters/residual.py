"""A low-rank residual beside a frozen backbone, as two factors, never a dense copy of a weight.

W x + s (U V) x, s = alpha / r of the LoRA beside it. The server moves U and V between rounds
(hpcfed.server.factors); clients hold them still. They are parameters of the model that need no
gradient, so ZeRO-3 shards them as it shards the backbone.

With `adapter.delta` the backbone follows LoRA while it trains, as in Delta-LoRA (Zi et al. 2023):
W += delta s (B' A' - B A) at each step. That telescopes to a factor 1 + delta on B A in the forward
pass, and a constant. W's part has no gradient for A and B, so theirs stays that of s B A x.
"""

from functools import partial
from typing import Any

import torch
from torch import nn

from hpcfed.adapters.base import Trainable, full_shape, zero
from hpcfed.adapters.factors import beside_name
from hpcfed.settings.config import Adapter


class Residual(nn.Module):
    """s U (V x)."""

    def __init__(self, width: int, out: int, rank: int, scale: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale = scale
        self.u = nn.Parameter(torch.zeros(out, rank, dtype=dtype), requires_grad=False)
        self.v = nn.Parameter(torch.zeros(rank, width, dtype=dtype), requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., width) to (..., out)."""
        linear = nn.functional.linear
        moved: torch.Tensor = linear(linear(hidden.to(self.v.dtype), self.v), self.u)
        return self.scale * moved


def beside(wrapped: nn.Module, factors: list[Trainable], adapter: Adapter) -> list[Trainable]:
    """Put a residual beside each layer that has these factors of LoRA, where the adapter has one,
    and make the backbone follow, where it does; the residuals' factors, which are not trained."""
    found = []
    names = {id(parameter): name for name, parameter in wrapped.named_parameters()}
    for trainable in factors:
        if trainable.role != "A":
            continue
        place = names[id(trainable.parameter)].partition(".lora_A.")[0]
        layer: Any = wrapped.get_submodule(place)
        down, up = trainable.owner, layer.lora_B["default"]
        if adapter.delta:
            down.register_forward_pre_hook(partial(_enter, 1 + adapter.delta))
            up.register_forward_hook(partial(_leave, adapter.delta))
        if not adapter.residual:
            continue
        (_, width), (out, _) = full_shape(trainable.parameter), full_shape(up.weight)
        scale, dtype = layer.scaling["default"], trainable.parameter.dtype
        residual = Residual(width, out, adapter.residual, scale, dtype)
        layer.add_module("residual", residual)
        layer.register_forward_hook(partial(_add, residual))
        for role, parameter in (("U", residual.u), ("V", residual.v)):
            name = beside_name(trainable.name, role)
            found.append(Trainable(trainable.block, role, name, parameter, residual, zero))
    return found


@torch.no_grad()
def fold(wrapped: nn.Module, gain: float) -> None:
    """Make the residuals part of the backbone's weights, the gain part of B, and singular values
    between the factors part of A, so that PEFT's own merge leaves nothing out. Every parameter must
    be whole."""
    for layer in wrapped.modules():
        residual, singular = (getattr(layer, name, None) for name in ("residual", "singular"))
        if isinstance(singular, nn.Module):
            inner: Any = layer
            inner.lora_A["default"].weight *= singular.weight
        if not isinstance(residual, Residual):
            continue
        owner: Any = layer
        weight, moved = owner.get_base_layer().weight, residual.scale * residual.u @ residual.v
        weight += moved.T if owner.fan_in_fan_out else moved
        owner.lora_B["default"].weight *= gain


def _add(residual: Residual, layer: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output + residual(args[0]).to(output.dtype)


class _Scaled(torch.autograd.Function):
    """The identity, whose gradient is scaled."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * ctx.factor, None


def _enter(factor: float, down: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What goes into A: what flows back below it has the whole factor."""
    entering: Any = _Scaled.apply(args[0], factor)  # type: ignore[no-untyped-call]
    return (entering, *args[1:])


def _leave(delta: float, up: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    """What comes out of B: (1 + delta) times as much, with the gradient of once."""
    return output + delta * output.detach()
