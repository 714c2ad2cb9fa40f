"""Prompts: trained virtual tokens in front of every text, all else frozen.

prefix (P-tuning v2, Liu et al. 2021; prefix tuning, Li and Liang 2021): keys and values of P
virtual tokens in the attention of every layer, without reparameterisation. One block per layer,
(P, 2, key-value width), so that the layers can be chosen, packed and masked one by one.

prompt (Lester et al. 2021): embeddings of P virtual tokens, (P, hidden), in front of the first
layer only; one block, "input".

Both as in PEFT, with positions counted on after the virtual tokens, so that PEFT loads what is
saved here. All values start from N(0, 0.02), the published FedPepTAO code's choice.
"""

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from hpcfed.adapters.base import (
    Adapted,
    Trainable,
    assemble,
    normal,
    text_config,
    train_head,
)
from hpcfed.adapters.layout import INPUT
from hpcfed.adapters.network import Network
from hpcfed.errors import UserError
from hpcfed.settings.config import Adapter

INITIAL_STD = 0.02
PREFIX = "base_model."
# They take past keys and values, but not as PEFT 0.21 gives them (tests/architectures.py).
_NOT_IN_PEFT = ("big_bird", "roformer")


class Copies(nn.Module):
    """Values of which every sample of a batch gets a copy, so that a sample's gradient can be told
    from another's."""

    copies = True

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape, dtype=dtype))

    def forward(self, anchor: torch.Tensor) -> torch.Tensor:
        """(samples, *shape). anchor: (samples,) zeros, see `Network`."""
        ones = [1] * self.weight.ndim
        return self.weight + anchor.to(self.weight.dtype).view(-1, *ones)


class Prefix(nn.Module):
    """Keys and values of virtual tokens in every layer."""

    lead = 0  # they stand beside the text, not in front of it

    def __init__(self, config: Any, adapter: Adapter, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads = key_value_heads(config)
        width = self.heads * head_width(config)
        shape = (adapter.virtual_tokens, 2, width)
        layers = int(config.num_hidden_layers)
        self.copies = [Copies(shape, dtype) for _ in range(layers)]
        self.layers = nn.ModuleList(self.copies)
        self.dropout = nn.Dropout(adapter.dropout)

    def forward(self, inputs: Mapping[str, torch.Tensor], anchor: torch.Tensor) -> dict[str, Any]:
        """The inputs with the prefix as past keys and values, and a mask that lets it be seen."""
        pairs = []
        for copies in self.copies:
            kv = self.dropout(copies(anchor))
            kv = kv.view(len(kv), kv.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
            pairs.append((kv[0], kv[1]))
        mask = _lengthened(inputs["attention_mask"], kv.shape[3], 1)
        return {**inputs, "attention_mask": mask, "past_key_values": FixedCache(pairs)}


class Lengthened(nn.Module):
    """The text's ids get placeholders in front, whose embeddings, or later hidden states, are
    replaced: so the model still sees ids, which it tells padding and positions from."""

    def __init__(self, adapter: Adapter, pad_id: int) -> None:
        super().__init__()
        self.dropout = nn.Dropout(adapter.dropout)
        self.lead = adapter.virtual_tokens
        self._placeholder = 0 if pad_id else 1

    def lengthened(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """The inputs with the placeholders."""
        fillers = {"input_ids": self._placeholder, "attention_mask": 1, "token_type_ids": 0}
        return {
            name: _lengthened(value, self.lead, fillers[name]) for name, value in inputs.items()
        }


class InFront(Lengthened):
    """Embeddings of virtual tokens in front of the text's, those that `values` gives."""

    def __init__(self, model: Any, adapter: Adapter, pad_id: int) -> None:
        super().__init__(adapter, pad_id)
        self._values: torch.Tensor | None = None
        model.get_input_embeddings().register_forward_hook(self._replace)

    def values(self, inputs: Mapping[str, torch.Tensor], anchor: torch.Tensor) -> torch.Tensor:
        """(samples, P, hidden)."""
        raise NotImplementedError

    def forward(self, inputs: Mapping[str, torch.Tensor], anchor: torch.Tensor) -> dict[str, Any]:
        """The inputs, lengthened by the virtual tokens."""
        self._values = self.dropout(self.values(inputs, anchor))
        return self.lengthened(inputs)

    def _replace(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        if self._values is None:
            return output
        values, self._values = self._values, None
        return torch.cat([values.to(output.dtype), output[:, self.lead :]], dim=1)


class Prompt(InFront):
    """The same for all texts."""

    def __init__(self, model: Any, adapter: Adapter, pad_id: int, dtype: torch.dtype) -> None:
        super().__init__(model, adapter, pad_id)
        width = model.get_input_embeddings().embedding_dim
        self.copies = Copies((adapter.virtual_tokens, width), dtype)

    def values(self, inputs: Mapping[str, torch.Tensor], anchor: torch.Tensor) -> torch.Tensor:
        """(samples, P, hidden), copies."""
        copies: torch.Tensor = self.copies(anchor)
        return copies


def _lengthened(values: torch.Tensor, tokens: int, filler: int) -> torch.Tensor:
    return torch.cat([values.new_full((len(values), tokens), filler), values], dim=1)


class FixedCache(DynamicCache):  # type: ignore[misc]
    """Keys and values (samples, heads, P, head width) of each layer, given in front of the text's.
    It keeps nothing: a block that is run again in backward finds what it found before."""

    def __init__(self, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        super().__init__()
        for index, (keys, values) in enumerate(pairs):
            super().update(keys, values, index)

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's prefix and the text's keys and values, joined."""
        prefix = self.layers[layer]
        return torch.cat([prefix.keys, keys], dim=-2), torch.cat([prefix.values, values], dim=-2)


def key_value_heads(config: Any) -> int:
    """Attention heads that keys and values have, fewer than queries have where they are grouped."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def head_width(config: Any) -> int:
    """Width of an attention head."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(width)


def adapt(
    model: Any,
    adapter: Adapter,
    blocks: dict[str, str],
    head: str | None,
    head_std: float,
    pad_id: int,
) -> Adapted:
    """Freeze the backbone, put prompts in front, train the classifier of this name, if any. blocks:
    see `transformer_blocks`.

    Raises UserError for an architecture whose attention takes no past keys and values, and for an
    encoder with a decoder, whose prompts PEFT could not load.
    """
    import peft

    refuse_two_stacks(model, adapter)
    model.requires_grad_(False)
    dtype = next(model.parameters()).dtype
    config = text_config(model)
    prompts: Prefix | Prompt
    if adapter.kind == "prefix":
        if "past_key_values" not in inspect.signature(model.base_model.forward).parameters:
            raise UserError(
                f"adapter.kind=prefix: the attention of {type(model).__name__} takes no past keys "
                "and values; use adapter.kind=lora or prompt."
            )
        if model.config.model_type in _NOT_IN_PEFT:
            raise UserError(
                f"adapter.kind=prefix: PEFT cannot run {type(model).__name__} with a prefix, and "
                "what is trained could not be loaded; use adapter.kind=lora or prompt."
            )
        prompts = Prefix(config, adapter, dtype)
        copies = {str(index): module for index, module in enumerate(prompts.copies)}
        heads, width = key_value_heads(config), key_value_heads(config) * head_width(config)
        kind = peft.PrefixTuningConfig
    else:
        prompts = Prompt(model, adapter, pad_id, dtype)
        copies = {INPUT: prompts.copies}
        heads, width = int(config.num_attention_heads), prompts.copies.weight.shape[1]
        kind = peft.PromptTuningConfig
    draw = partial(normal, std=INITIAL_STD)
    trainables = [
        Trainable(block, "prompt", f"{block}.weight", module.weight, module, draw, neuron_axis=0)
        for block, module in copies.items()
    ]
    peft_config = kind(
        num_virtual_tokens=adapter.virtual_tokens,
        num_layers=int(config.num_hidden_layers),
        num_transformer_submodules=1,
        num_attention_heads=heads,
        token_dim=width,
        task_type=_task_type(model, head),
    )
    # PEFT takes the classifier as a whole, whatever of it is trained.
    peft_config.modules_to_save = [head.partition(".")[0]] if head else []
    trainables += train_head(model, head, PREFIX, head_std)
    network = Network(model, model, prompts)
    return assemble(network, model, trainables, blocks, peft_config, PREFIX, columns=True)


def refuse_two_stacks(model: Any, adapter: Adapter) -> None:
    """Raises UserError for an encoder with a decoder."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(
            f"adapter.kind={adapter.kind}: {type(model).__name__} is an encoder with a decoder, "
            "and prompts go with one of the two alone; use adapter.kind=lora or bottleneck."
        )


def _task_type(model: Any, head: str | None) -> str:
    """PEFT's class around the model; the one for features passes on what any model gives."""
    if head is not None:
        return "SEQ_CLS"
    return "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else "FEATURE_EXTRACTION"
