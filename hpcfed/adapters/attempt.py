"""attempt: attentional mixtures of soft prompts (Asai et al. 2022), and the head.

Source prompts, trained before on other tasks, are frozen. The virtual tokens in front of a text are
a trained prompt and a mixture of all: P + sum_j a_j P_j, with P itself among the P_j, and

    a = softmax(h . max P_j / (e H)),   h = LayerNorm(W_up silu(W_down x)),   x = max of the text's
    embeddings,

each maximum over tokens. Here LayerNorm has no values of its own, and all start at N(0, 0.02).

PEFT has no such adapter: the folder holds adapter_model.safetensors, the sources too, and an
adapter_config.json of our own, which examples/load_prompts.py reads without hpcfed.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from hpcfed.adapters import start
from hpcfed.adapters.base import Adapted, Trainable, assemble, normal, train_head
from hpcfed.adapters.layout import INPUT
from hpcfed.adapters.network import Network
from hpcfed.adapters.prompts import INITIAL_STD, Copies, InFront, refuse_two_stacks
from hpcfed.errors import UserError
from hpcfed.settings.config import Adapter

SAVED_BY_PEFT = "prompt_embeddings"
SOURCES = "sources"


class Mixture(InFront):
    """sources: (count, P, hidden)."""

    def __init__(
        self, model: Any, adapter: Adapter, pad_id: int, sources: torch.Tensor, dtype: torch.dtype
    ) -> None:
        super().__init__(model, adapter, pad_id)
        _, tokens, width = sources.shape
        size = max(1, width // adapter.reduction)
        self.copies = Copies((tokens, width), dtype)
        self.down = nn.Linear(width, size, bias=False, dtype=dtype)
        self.up = nn.Linear(size, width, bias=False, dtype=dtype)
        self.sources = nn.Parameter(sources.to(dtype), requires_grad=False)
        self._embed = partial(_embedded, model)  # not a submodule: the network has the model

    def values(self, inputs: Mapping[str, torch.Tensor], anchor: torch.Tensor) -> torch.Tensor:
        """(samples, P, hidden)."""
        own, sources = self.copies(anchor), self.sources
        padding = inputs["attention_mask"].unsqueeze(-1) == 0
        text = self._embed(inputs["input_ids"]).masked_fill(padding, -math.inf).amax(1)
        text = text.to(own.dtype) + anchor.to(own.dtype)[:, None]
        width = text.shape[-1]
        query = nn.functional.layer_norm(self.up(nn.functional.silu(self.down(text))), (width,))
        scores = [query @ sources.amax(1).T, (query * own.amax(1)).sum(1, keepdim=True)]
        weights = (torch.cat(scores, dim=1) / (math.e * width)).softmax(1)
        mixed = torch.einsum("sj,jph->sph", weights[:, :-1], sources)
        result: torch.Tensor = own * (1 + weights[:, -1, None, None]) + mixed
        return result


def _embedded(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """(samples, positions, hidden)."""
    with torch.no_grad():
        embeddings: torch.Tensor = model.get_input_embeddings()(ids)
    return embeddings


def read_sources(adapter: Adapter, width: int) -> torch.Tensor:
    """(count, P, hidden) fp32. Raises UserError for folders that hold no prompt of this shape."""
    found = []
    for folder in adapter.sources:
        prompt = start.read(folder, "adapter.sources").tensors.get(SAVED_BY_PEFT)
        wanted = (adapter.virtual_tokens, width)
        if prompt is None or tuple(prompt.shape) != wanted:
            shape = "no prompt" if prompt is None else f"a prompt of shape {list(prompt.shape)}"
            raise UserError(
                f"adapter.sources: {folder!r} holds {shape}, and here it must be {list(wanted)}: "
                "adapter.virtual_tokens and the model's width; give folders of prompt-tuning runs "
                "of the same model."
            )
        found.append(prompt.float())
    return torch.stack(found)


def adapt(
    model: Any,
    adapter: Adapter,
    blocks: dict[str, str],
    head: str | None,
    head_std: float,
    pad_id: int,
) -> Adapted:
    """Freeze the backbone, put the mixture in front, train it and the classifier of this name, if
    any. blocks: see `transformer_blocks`. Raises UserError for an encoder with a decoder."""
    refuse_two_stacks(model, adapter)
    model.requires_grad_(False)
    dtype = next(model.parameters()).dtype
    width = int(model.get_input_embeddings().embedding_dim)
    sources = read_sources(adapter, width)
    prompts = Mixture(model, adapter, pad_id, sources, dtype)
    draw = partial(normal, std=INITIAL_STD)
    owners = {"prompt": prompts.copies, "down": prompts.down, "up": prompts.up}
    trainables = []
    for role, owner in owners.items():
        assert isinstance(owner.weight, nn.Parameter)
        name = f"{role}.weight"
        trainables.append(Trainable(INPUT, role, name, owner.weight, owner, draw, 0))
    trainables += train_head(model, head, "", head_std)
    config = {
        "kind": "hpcfed-attempt", "virtual_tokens": adapter.virtual_tokens,
        "reduction": adapter.reduction, "width": width, "sources": len(sources), "pad_id": pad_id,
        "head": head,
    }  # fmt: skip
    network = Network(model, model, prompts)
    return assemble(network, model, trainables, blocks, config, "", frozen={SOURCES: sources})
