"""PEFT LoRA on the linear layers of a transformer's blocks, and the head, as one layout.

LoRA (Hu et al. 2021): W x + (alpha / r) B A x, with A (r, d_in), B (d_out, r). B starts at zero,
A at U(-1/sqrt(d_in), 1/sqrt(d_in)), PEFT's default, but drawn from our own seeds. rsLoRA
(Kalajdzievski 2023) scales by alpha / sqrt(r), so that a higher rank does not train more slowly.
"""

import math
from typing import Any

from torch import nn

from hpcfed.adapters import targets
from hpcfed.adapters.base import Adapted, Trainable, assemble, block_of, train_head, zero
from hpcfed.adapters.factors import uniform
from hpcfed.adapters.network import Network
from hpcfed.adapters.residual import beside
from hpcfed.errors import UserError
from hpcfed.settings.config import Adapter

PREFIX = "base_model.model."


def adapt(
    model: nn.Module,
    adapter: Adapter,
    blocks: dict[str, str],
    head: str | None,
    head_std: float,
    pad_id: int = 0,
) -> Adapted:
    """Freeze the backbone, add LoRA to the targets in every block, train the classifier of this
    name, if any. blocks: see `transformer_blocks`. Raises UserError as `wrap` does.
    """
    wrapped, lora_config = wrap(model, adapter, blocks)
    trainables = []
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            block = block_of(name.removeprefix(PREFIX), blocks)
            assert block is not None, f"trainable parameter {name} belongs to no block"
            owner = wrapped.get_submodule(name.rpartition(".")[0])
            # A neuron is an output row of B (d_out, r); of A (r, d_in), an input column.
            role, draw, axis = ("A", uniform, 1) if ".lora_A." in name else ("B", zero, 0)
            saved = name.replace(".default.", ".")
            trainables.append(Trainable(block, role, saved, parameter, owner, draw, axis))
    trainables += beside(wrapped, trainables, adapter)
    trainables += train_head(model, head, PREFIX, head_std)
    if adapter.residual:  # saved, it is part of LoRA: so many more ranks, at the same factor
        root = math.sqrt(adapter.rank) if adapter.rslora else adapter.rank
        lora_config.r = adapter.rank + adapter.residual
        alpha: Any = adapter.alpha / root * lora_config.r  # PEFT says int, and takes both
        lora_config.lora_alpha, lora_config.use_rslora = alpha, False
    lora_config.modules_to_save = [head] if head else []
    network = Network(wrapped, model, None)
    gain = 1 + adapter.delta
    return assemble(network, model, trainables, blocks, lora_config, PREFIX, gain=gain)


def wrap(model: nn.Module, adapter: Adapter, blocks: dict[str, str]) -> tuple[nn.Module, Any]:
    """PEFT's model with LoRA on the targets in every block, and its configuration.

    Raises UserError, listing the legal ones, if a target names no linear layer of a block, and for
    a model without any.
    """
    import peft
    from transformers.pytorch_utils import Conv1D

    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and block_of(name, blocks) is not None
    }
    legal = {name.rsplit(".", 1)[-1] for name in linear}
    if not legal:
        raise UserError(
            f"adapter.kind={adapter.kind}: {type(model).__name__} has no linear layers in its "
            "blocks, and LoRA goes on nothing else; give another model."
        )
    chosen = targets.choose(model, legal, adapter.targets)
    adapted = [name for name in linear if name.rsplit(".", 1)[-1] in chosen]
    lora_config = peft.LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        use_rslora=adapter.rslora,
        target_modules=adapted,
        fan_in_fan_out=isinstance(linear[adapted[0]], Conv1D),
    )
    # PEFT would keep LoRA in fp32 beside a bf16 head; ZeRO-3 insists on one trainable dtype.
    wrapped: nn.Module = peft.get_peft_model(model, lora_config, autocast_adapter_dtype=False)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            # Beside packed weights, whose type tells nothing, PEFT makes it in fp32.
            parameter.data = parameter.data.to(dtype)
    return wrapped, lora_config
