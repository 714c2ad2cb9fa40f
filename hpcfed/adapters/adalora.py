"""AdaLoRA (Zhang et al. 2023): W x + (alpha / r) P Lambda Q x, with Q (r, d_in), P (d_out, r) and
Lambda diagonal, (r, 1): a singular value decomposition that training holds to by a penalty,

    gamma (|| P'P - I ||_F + || QQ' - I ||_F), the mean over all P and Q of the model,

so that a singular value can be taken away (hpcfed.server.budget) without turning the others. Lambda
starts at zero, P and Q at N(0, 0.02), PEFT's defaults. Saved, it is an AdaLoRA of PEFT's.

While it trains, P and Q are the two linear layers of PEFT's LoRA and Lambda a module between them:
PEFT's own layer holds its values in no module that is called, and neither ZeRO-3, which gathers by
modules, nor the hooks of hpcfed.importance.fisher would see them.
"""

from functools import partial
from typing import Any

import torch
from torch import nn

from hpcfed.adapters.base import (
    Adapted,
    Trainable,
    assemble,
    block_of,
    full_shape,
    normal,
    train_head,
    zero,
)
from hpcfed.adapters.lora import PREFIX, wrap
from hpcfed.adapters.network import Network, Penalty
from hpcfed.settings.config import Adapter

INITIAL_STD = 0.02
# PEFT divides by the rank and a little more.
_LITTLE = 1e-5


class Singular(nn.Module):
    """Lambda, a copy for each sample, so that a sample's gradient is the one at its copy."""

    copies = True

    def __init__(self, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rank, 1, dtype=dtype))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(samples, r, 1) for hidden (samples, ..., r)."""
        return self.weight.expand(len(hidden), *self.weight.shape)


def adapt(
    model: nn.Module,
    adapter: Adapter,
    blocks: dict[str, str],
    head: str | None,
    head_std: float,
    pad_id: int = 0,
) -> Adapted:
    """As hpcfed.adapters.lora.adapt, with singular values between the factors."""
    import peft

    wrapped, lora = wrap(model, adapter, blocks)
    penalty = Penalty()
    draw = partial(normal, std=INITIAL_STD)
    trainables = []
    layers: dict[str, Any] = {
        name: module for name, module in wrapped.named_modules() if hasattr(module, "lora_A")
    }
    weight = adapter.orthogonality / (2 * len(layers))
    for name, layer in layers.items():
        block = block_of(name.removeprefix(PREFIX), blocks)
        assert block is not None, f"the layer {name} belongs to no block"
        right, left = layer.lora_A["default"], layer.lora_B["default"]
        layer.scaling["default"] = adapter.alpha / (adapter.rank + _LITTLE)
        singular = Singular(full_shape(right.weight)[0], right.weight.dtype)
        layer.add_module("singular", singular)
        left.register_forward_pre_hook(partial(_scale, singular))
        # A neuron is an input column of Q, or an output row of P.
        for role, saved, owner, start, axis in (
            ("Q", "lora_A", right, draw, 1),
            ("Lambda", "lora_E", singular, zero, None),
            ("P", "lora_B", left, draw, 0),
        ):
            parameter = owner.weight
            trainables.append(
                Trainable(block, role, f"{name}.{saved}", parameter, owner, start, axis)
            )
            if role != "Lambda":
                owner.register_forward_hook(partial(_hold, penalty, weight, role == "P"))
    trainables += train_head(model, head, PREFIX, head_std)
    config = peft.AdaLoraConfig(
        init_r=adapter.rank,
        target_r=adapter.rank,
        lora_alpha=lora.lora_alpha,
        lora_dropout=adapter.dropout,
        target_modules=lora.target_modules,
        fan_in_fan_out=lora.fan_in_fan_out,
        orth_reg_weight=adapter.orthogonality,
        total_step=1,  # PEFT wants one; its schedule is not used
        modules_to_save=[head] if head else [],
    )
    network = Network(wrapped, model, None, penalty if adapter.orthogonality else None)
    return assemble(network, model, trainables, blocks, config, PREFIX)


def _scale(singular: nn.Module, left: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What goes into P: Lambda times what comes out of Q."""
    hidden = args[0]
    copies = singular(hidden)
    between = [1] * (hidden.ndim - 2)
    return (hidden * copies.view(len(hidden), *between, -1), *args[1:])


def _hold(
    penalty: Penalty, weight: float, columns: bool, owner: Any, args: Any, output: torch.Tensor
) -> torch.Tensor | None:
    """In training, let the backward pass of this output add the gradient of the penalty. Here, and
    not in the loss, since a matrix that ZeRO-3 has partitioned is whole just now."""
    if not owner.training or not torch.is_grad_enabled() or not weight:
        return None
    matrix = owner.weight.float()
    gram = matrix.T @ matrix if columns else matrix @ matrix.T
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    distance = torch.linalg.matrix_norm(gram - eye)
    return penalty.attached(output, weight * distance)
