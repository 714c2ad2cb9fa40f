"""Prompts that a small network makes of each text, all else frozen, and the head.

idpg (instance-dependent prompt generation, Wu et al. 2022): virtual tokens in front of the first
layer, made of a sentence vector, the mean of the frozen model's last hidden states over the text;
it takes a forward of its own, without dropout. A plain bottleneck: no hypercomplex products.

lpt (late prompt tuning, Liu et al. 2022): virtual tokens that enter a middle layer, made of the
mean of the text's hidden states there. Below that layer nothing needs a gradient, and autograd
keeps nothing.

The network: W_up gelu(W_down h + b) + c, (P, hidden). W and c start at N(0, 0.02), b at zero: at
first the tokens are hardly of the text, and as a prompt's. GELU has curvature to measure.

PEFT has neither: the folder holds adapter_model.safetensors and an adapter_config.json of our own,
which examples/load_prompts.py reads without hpcfed.
"""

import inspect
from collections.abc import Mapping
from functools import partial
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
    zero,
)
from hpcfed.adapters.layout import INPUT
from hpcfed.adapters.network import Network
from hpcfed.adapters.prompts import InFront, Lengthened, refuse_two_stacks
from hpcfed.errors import UserError
from hpcfed.settings.config import Adapter

INITIAL_STD = 0.02


class Generator(nn.Module):
    """(samples, hidden) to (samples, P, hidden)."""

    def __init__(self, width: int, adapter: Adapter, dtype: torch.dtype) -> None:
        super().__init__()
        size = max(1, width // adapter.reduction)
        self.down = nn.Linear(width, size, dtype=dtype)
        self.up = nn.Linear(size, adapter.virtual_tokens * width, dtype=dtype)

    def forward(self, vectors: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        """anchor: (samples,) zeros, see `Network`."""
        vectors = vectors.to(self.down.weight.dtype) + anchor.to(self.down.weight.dtype)[:, None]
        made: torch.Tensor = self.up(nn.functional.gelu(self.down(vectors)))
        return made.view(len(made), -1, vectors.shape[1])


def pooled(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(samples, hidden): the mean over the tokens that mask (samples, positions) has."""
    inside = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * inside).sum(1) / inside.sum(1)


class FromSentence(InFront):
    """IDPG: in front of the first layer."""

    def __init__(self, model: Any, adapter: Adapter, pad_id: int, dtype: torch.dtype) -> None:
        super().__init__(model, adapter, pad_id)
        self.generator = Generator(model.get_input_embeddings().embedding_dim, adapter, dtype)
        self._sentence = partial(_sentence, model)  # not a submodule: the network has the model

    def values(self, inputs: Mapping[str, torch.Tensor], anchor: torch.Tensor) -> torch.Tensor:
        """(samples, P, hidden)."""
        made: torch.Tensor = self.generator(self._sentence(inputs), anchor)
        return made


def _sentence(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """(samples, hidden), the same in training and in evaluation."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            hidden = model.base_model(**inputs).last_hidden_state
    finally:
        model.train(training)
    return pooled(hidden, inputs["attention_mask"])


class Late(Lengthened):
    """LPT: into a middle layer. In the layers below no token of the text sees the placeholders."""

    def __init__(
        self,
        blocks: list[nn.Module],
        layer: int,
        config: Any,
        adapter: Adapter,
        pad_id: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(adapter, pad_id)
        self.generator = Generator(int(config.hidden_size), adapter, dtype)
        self._config = config
        self._anchor = self._mask = torch.zeros(0)
        for block in blocks[:layer]:
            place = list(inspect.signature(block.forward).parameters).index("attention_mask")
            causal = any(getattr(module, "is_causal", False) for module in block.modules())
            hide = partial(self._hide, place, causal)
            block.register_forward_pre_hook(hide, with_kwargs=True)
        blocks[layer].register_forward_pre_hook(self._enter, with_kwargs=True)

    def forward(self, inputs: Mapping[str, torch.Tensor], anchor: torch.Tensor) -> dict[str, Any]:
        """The inputs, lengthened by the virtual tokens."""
        self._anchor, self._mask = anchor, inputs["attention_mask"]
        return self.lengthened(inputs)

    def _hide(self, place: int, causal: bool, module: nn.Module, args: Any, kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        positional = len(args) > place
        mask = args[place] if positional else kwargs.get("attention_mask")
        index = torch.arange(hidden.shape[1], device=hidden.device)
        # Placeholders see each other, since a row that sees nothing may be no number.
        seen = (index >= self.lead)[None, :] | (index < self.lead)[:, None]
        if mask is None:
            seen = seen.tril() if causal else seen
            mask = torch.ones_like(seen)[None, None]
            if self._config._attn_implementation == "eager":  # which adds its masks
                mask = torch.zeros_like(mask, dtype=hidden.dtype)
        if mask.dtype == torch.bool:
            mask = mask & seen
        else:
            mask = mask.masked_fill(~seen, torch.finfo(mask.dtype).min)
        if positional:
            return (*args[:place], mask, *args[place + 1 :]), kwargs
        return args, {**kwargs, "attention_mask": mask}

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        text = hidden[:, self.lead :]
        made = self.dropout(self.generator(pooled(text, self._mask), self._anchor))
        hidden = torch.cat([made.to(hidden.dtype), text], dim=1)
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}


def adapt(
    model: Any,
    adapter: Adapter,
    blocks: dict[str, str],
    head: str | None,
    head_std: float,
    pad_id: int,
) -> Adapted:
    """Freeze the backbone, put the prompts in, train their network and the classifier of this name,
    if any. blocks: see `transformer_blocks`.

    Raises UserError for an encoder with a decoder, and where there is no such layer, or the layers
    below take no mask.
    """
    refuse_two_stacks(model, adapter)
    model.requires_grad_(False)
    dtype = next(model.parameters()).dtype
    width = int(text_config(model).hidden_size)
    layer = None
    prompts: FromSentence | Late
    if adapter.kind == "idpg":
        prompts = FromSentence(model, adapter, pad_id, dtype)
    else:
        layer = _layer(model, adapter, blocks)
        modules = [model.get_submodule(name) for name in blocks]
        prompts = Late(modules, layer, text_config(model), adapter, pad_id, dtype)
    draw, trainables = partial(normal, std=INITIAL_STD), []
    for role, owner in (("down", prompts.generator.down), ("up", prompts.generator.up)):
        assert isinstance(owner.weight, nn.Parameter) and isinstance(owner.bias, nn.Parameter)
        weight, bias = (f"generator.{role}.{kind}" for kind in ("weight", "bias"))
        trainables.append(Trainable(INPUT, role, weight, owner.weight, owner, draw, 0))
        start = draw if role == "up" else zero
        trainables.append(Trainable(INPUT, role, bias, owner.bias, owner, start))
    trainables += train_head(model, head, "", head_std)
    config = {
        "kind": f"hpcfed-{adapter.kind}", "virtual_tokens": adapter.virtual_tokens,
        "reduction": adapter.reduction, "width": width, "layer": layer, "pad_id": pad_id,
        "head": head,
    }  # fmt: skip
    network = Network(model, model, prompts)
    extra = 1 if adapter.kind == "idpg" else 0
    return assemble(network, model, trainables, blocks, config, "", extra=extra)


def _layer(model: Any, adapter: Adapter, blocks: dict[str, str]) -> int:
    """The layer that virtual tokens enter."""
    layers = int(text_config(model).num_hidden_layers)
    layer = layers // 2 if adapter.layer is None else adapter.layer
    name = type(model).__name__
    if layer >= len(blocks):
        raise UserError(
            f"adapter.kind=lpt: {name} has no block of its own for layer {layer} (adapter.layer, "
            f"from 0): it has {len(blocks)}; give another, or use adapter.kind=prompt."
        )
    for block in map(model.get_submodule, list(blocks)[:layer]):
        if "attention_mask" not in inspect.signature(block.forward).parameters:
            raise UserError(
                f"adapter.kind=lpt: the layers of {name} take no attention mask; use "
                "adapter.kind=prompt or idpg."
            )
    return layer
