"""Bottleneck adapters on the outputs of a transformer's blocks, and the head, as one layout.

h + W_up act(W_down h) (Houlsby et al. 2019), two in each block, behind the attention's output and
behind the feed-forward's; or one, behind the feed-forward's (Pfeiffer et al. 2021). Before the
residual sum; W_up and the biases start at zero, so a fresh adapter is the identity; W_down at
N(0, 0.02). GELU between, which unlike ReLU has curvature to measure; LayerNorms stay frozen.

PEFT has no such adapter: its folder holds adapter_model.safetensors and an adapter_config.json of
our own, and `load` puts it into a model.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hpcfed.adapters.base import (
    Adapted,
    Trainable,
    assemble,
    normal,
    text_config,
    train_head,
    transformer_blocks,
    zero,
)
from hpcfed.adapters.network import Network
from hpcfed.errors import UserError
from hpcfed.settings.config import Adapter

INITIAL_STD = 0.02
KIND = "hpcfed-bottleneck"
PLACES = {"houlsby": ("attention", "output"), "pfeiffer": ("output",)}


class Bottleneck(nn.Module):
    """h + W_up gelu(W_down h)."""

    def __init__(self, width: int, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.down = nn.Linear(width, size, dtype=dtype)
        self.up = nn.Linear(size, width, dtype=dtype)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., width) to the same."""
        changed: torch.Tensor = hidden + self.up(nn.functional.gelu(self.down(hidden)))
        return changed


def attach(
    model: nn.Module, blocks: dict[str, str], placement: str, reduction: int, width: int
) -> dict[str, Bottleneck]:
    """Put fresh bottlenecks into the blocks; name -> bottleneck, as "3.attention".

    blocks: module name of each transformer block in `model` -> its layer. Raises UserError where a
    block has no linear layer that ends its attention or its feed-forward.
    """
    dtype = next(model.parameters()).dtype
    found: dict[str, Bottleneck] = {}
    for module_name, layer in blocks.items():
        outputs = _outputs(model.get_submodule(module_name))
        for place in PLACES[placement]:
            if place not in outputs:
                raise UserError(
                    f"adapter.placement={placement}: {type(model).__name__} has no linear layer "
                    f"that ends the {place} of a block; use adapter.kind=lora."
                )
            bottleneck = Bottleneck(width, max(1, width // reduction), dtype)
            outputs[place].register_forward_hook(partial(_insert, bottleneck))
            found[f"{layer}.{place}"] = bottleneck
    return found


def _insert(bottleneck: Bottleneck, module: nn.Module, args: Any, output: torch.Tensor) -> Any:
    return bottleneck(output)


def _outputs(block: nn.Module) -> dict[str, nn.Module]:
    """The linear layers that end the block's attention and its feed-forward: the last ones."""
    from transformers.pytorch_utils import Conv1D

    found: dict[str, nn.Module] = {}
    for name, module in block.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            inside = any("attn" in part or "attention" in part for part in name.split("."))
            found["attention" if inside else "output"] = module
    return found


def adapt(
    model: Any,
    adapter: Adapter,
    blocks: dict[str, str],
    head: str | None,
    head_std: float,
    pad_id: int,
) -> Adapted:
    """Freeze the backbone, put bottlenecks into every block, train the classifier of this name, if
    any. blocks: see `transformer_blocks`."""
    model.requires_grad_(False)
    width = int(text_config(model).hidden_size)
    found = attach(model, blocks, adapter.placement, adapter.reduction, width)
    draw = partial(normal, std=INITIAL_STD)
    trainables = []
    for name, bottleneck in found.items():
        layer = name.partition(".")[0]
        for role, owner in (("down", bottleneck.down), ("up", bottleneck.up)):
            start = draw if role == "down" else zero
            # A neuron is a row of W_down, or of W_up: what it reads or writes with.
            weight, bias = (f"{name}.{role}.{kind}" for kind in ("weight", "bias"))
            assert isinstance(owner.weight, nn.Parameter) and isinstance(owner.bias, nn.Parameter)
            trainables.append(Trainable(layer, role, weight, owner.weight, owner, start, 0))
            trainables.append(Trainable(layer, role, bias, owner.bias, owner, zero))
    trainables += train_head(model, head, "", head_std)
    # Registered with the model, so that the engine sees their parameters.
    model.add_module("bottlenecks", nn.ModuleList(found.values()))
    config = {
        "kind": KIND, "placement": adapter.placement, "reduction": adapter.reduction,
        "width": width, "head": head,
    }  # fmt: skip
    return assemble(Network(model, model, None), model, trainables, blocks, config, "")


def load(model: Any, folder: str | Path) -> Any:
    """Put the adapter of a run directory (its folder `adapter`) into a Hugging Face model of the
    class it was trained with, which is changed in place and returned.

    Raises UserError if the folder holds another kind of adapter.
    """
    from safetensors.torch import load_file

    path = Path(folder)
    config = json.loads((path / "adapter_config.json").read_text())
    if config.get("kind") != KIND:
        raise UserError(f"{path} holds no bottleneck adapter; load it with PEFT.")
    blocks = transformer_blocks(model)
    found = attach(model, blocks, config["placement"], config["reduction"], config["width"])
    tensors = load_file(path / "adapter_model.safetensors")
    named = {
        f"{name}.{inner}": parameter
        for name, bottleneck in found.items()
        for inner, parameter in bottleneck.named_parameters()
    }
    named |= {name: parameter for name, parameter in model.named_parameters() if name in tensors}
    with torch.no_grad():
        for name, tensor in tensors.items():
            named[name].copy_(tensor)
    model.add_module("bottlenecks", nn.ModuleList(found.values()))
    return model
