"""PEFT LoRA on the linear layers of a transformer's blocks, and the head, as one layout.

LoRA (Hu et al. 2021): W x + (alpha / r) B A x, with A (r, d_in), B (d_out, r). B starts at zero,
A at U(-1/sqrt(d_in), 1/sqrt(d_in)), PEFT's default, but drawn from our own seeds.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from hpcfed.adapters.layout import HEAD, AdapterLayout
from hpcfed.config import Adapter
from hpcfed.errors import UserError
from hpcfed.rng import generator


@dataclass(frozen=True)
class Adapted:
    """A model with its trainable parameters in layout order; entry names are PEFT's saved keys.

    owners: the linear module that each parameter belongs to. blocks: the transformer's blocks.
    """

    model: nn.Module
    layout: AdapterLayout
    parameters: tuple[nn.Parameter, ...]
    owners: tuple[nn.Module, ...]
    blocks: tuple[nn.Module, ...]
    lora_config: Any  # peft.LoraConfig


def transformer_blocks(model: nn.Module, layers: int) -> dict[str, str]:
    """Module name of each transformer block -> its block name "0", "1", ...

    The stack is the ModuleList with as many entries as the model has layers.
    """
    blocks: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            for index in range(layers):
                blocks[f"{name}.{index}"] = str(len(blocks))
    if not blocks:
        raise UserError(
            f"No stack of {layers} transformer blocks found in {type(model).__name__}; "
            "this architecture is not supported."
        )
    return blocks


def final_linear(model: nn.Module, labels: int) -> str:
    """Name of the head: the last linear layer with one output per label."""
    heads = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == labels
    ]
    if not heads:
        raise UserError(
            f"{type(model).__name__} has no linear layer with {labels} outputs to use as the head."
        )
    return heads[-1]


def _block_of(name: str, blocks: dict[str, str]) -> str | None:
    parts = name.split(".")
    prefixes = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((blocks[prefix] for prefix in prefixes if prefix in blocks), None)


def adapt(model: nn.Module, adapter: Adapter, layers: int, labels: int) -> Adapted:
    """Freeze the backbone, add LoRA to the targets in every block, train the head's last layer.

    Raises UserError, listing the legal ones, if a target names no linear layer of a block.
    """
    import peft
    from transformers.pytorch_utils import Conv1D

    blocks = transformer_blocks(model, layers)
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and _block_of(name, blocks) is not None
    }
    legal = sorted({name.rsplit(".", 1)[-1] for name in linear})
    for target in adapter.targets:
        if target not in legal:
            raise UserError(
                f"adapter.targets names {target!r}, which {type(model).__name__} does not have in "
                f"its blocks; legal targets: {', '.join(legal)}."
            )
    targets = [name for name in linear if name.rsplit(".", 1)[-1] in adapter.targets]
    head = final_linear(model, labels)
    lora_config = peft.LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=targets,
        fan_in_fan_out=isinstance(linear[targets[0]], Conv1D),
    )
    # PEFT would keep LoRA in fp32 beside a bf16 head; ZeRO-3 insists on one trainable dtype.
    wrapped: nn.Module = peft.get_peft_model(model, lora_config, autocast_adapter_dtype=False)
    for parameter in model.get_submodule(head).parameters():
        parameter.requires_grad_(True)
    found: dict[str, tuple[str, nn.Parameter, nn.Module]] = {}
    prefix = "base_model.model."
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            inner = name.removeprefix(prefix)
            block = HEAD if inner.startswith(f"{head}.") else _block_of(inner, blocks)
            if block is None:
                raise RuntimeError(f"trainable parameter {name} belongs to no block")
            owner = wrapped.get_submodule(name.rpartition(".")[0])
            found[name.replace(".default.", ".")] = (block, parameter, owner)
    layout = AdapterLayout.build(
        [
            (block, name, full_shape(parameter), _neuron_axis(name))
            for name, (block, parameter, _) in found.items()
        ]
    )
    lora_config.modules_to_save = [head]
    return Adapted(
        wrapped,
        layout,
        tuple(found[e.name][1] for e in layout.entries),
        tuple(found[e.name][2] for e in layout.entries),
        tuple(model.get_submodule(name) for name in blocks),
        lora_config,
    )


def _neuron_axis(name: str) -> int | None:
    """A neuron of an adapted matrix is an output row of B (d_out, r); of A (r, d_in), an input
    column."""
    if ".lora_B." in name:
        return 0
    return 1 if ".lora_A." in name else None


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of a parameter, also where ZeRO-3 has partitioned it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def initial_values(layout: AdapterLayout, seed: int, head_std: float) -> torch.Tensor:
    """(layout.size,) fp32: LoRA A uniform, B zero, head weight N(0, head_std), head bias zero."""
    vector = np.zeros(layout.size, dtype=np.float32)
    for entry in layout.entries:
        rng = generator(seed, "init", entry.name)
        if entry.block == HEAD:
            if len(entry.shape) > 1:
                vector[entry.values] = rng.normal(0, head_std, entry.size)
        elif ".lora_A." in entry.name:
            bound = 1 / math.sqrt(entry.shape[1])
            vector[entry.values] = rng.uniform(-bound, bound, entry.size)
    return torch.from_numpy(vector)
