"""The obvious versions: one sample at a time, no padding, plain PyTorch, none of hpcfed's hooks."""

from typing import Any

import numpy as np
import torch
from torch import nn

from hpcfed import model
from hpcfed.config import Config
from hpcfed.data.batches import Ids, Tokens

CPU = torch.device("cpu")


class Plain:
    """The adapted model, unsharded, as one function of its trainable vector."""

    def __init__(self, config: Config, labels: tuple[str, ...]) -> None:
        prepared = model.prepare(config, labels, 0, {})
        self.layout = prepared.adapted.layout
        self.network = prepared.adapted.model.eval()
        names = {id(p): name for name, p in self.network.named_parameters()}
        self._names = [names[id(p)] for p in prepared.adapted.parameters]

    def losses(self, vector: torch.Tensor, rows: Ids, tokens: Tokens) -> torch.Tensor:
        """(len(rows),) losses, differentiable in `vector`."""
        values = {
            name: vector[entry.values].reshape(entry.shape)
            for name, entry in zip(self._names, self.layout.entries, strict=True)
        }
        inputs = tokens.collate(rows, CPU)
        labels = inputs.pop("labels")
        output = torch.func.functional_call(self.network, values, kwargs=inputs)
        return nn.functional.cross_entropy(output.logits, labels, reduction="none")

    def gradient(self, vector: torch.Tensor, row: int, tokens: Tokens) -> torch.Tensor:
        """(size,) of one sample's loss."""
        leaf = vector.clone().requires_grad_()
        (found,) = torch.autograd.grad(self.losses(leaf, np.array([row]), tokens).sum(), leaf)
        return found

    def train(
        self, vector: torch.Tensor, trainable: torch.Tensor, batches: list[Ids], tokens: Tokens,
        make: object, clip: float,
    ) -> torch.Tensor:  # fmt: skip
        """The vector after a step on each batch's mean loss; what is not trainable is a constant,
        and no parameter. make: optimizer of a list of parameters."""
        free = nn.Parameter(vector[trainable].clone())
        optimizer = make([free])  # type: ignore[operator]
        for batch in batches:
            whole = vector.clone()
            whole[trainable] = free
            optimizer.zero_grad()
            self.losses(whole, batch, tokens).mean().backward()
            if clip:
                nn.utils.clip_grad_norm_([free], clip)
            optimizer.step()
        result = vector.clone()
        result[trainable] = free.detach()
        return result

    def sensitivity(self, vector: torch.Tensor, row: int, tokens: Tokens) -> list[float]:
        """Relative change of each block's output under noise of 0.05 ||e|| along the gradient at
        the embeddings, one sample without padding."""
        with torch.no_grad():
            for name, entry in zip(self._names, self.layout.entries, strict=True):
                part = vector[entry.values].reshape(entry.shape)
                self.network.get_parameter(name).copy_(part)
        inputs = tokens.collate(np.array([row]), CPU)
        labels = inputs.pop("labels")
        backbone = self.network.get_base_model().base_model  # type: ignore[operator, union-attr]
        blocks = backbone.encoder.layer if hasattr(backbone, "encoder") else backbone.layers
        embeddings = getattr(backbone, "embeddings", None) or backbone.embed_tokens
        noise = torch.zeros(1)
        seen: list[torch.Tensor] = []

        def enter(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
            seen.append((output.detach() + noise).requires_grad_())
            return seen[-1]

        def leave(module: nn.Module, args: object, output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)

        handles = [embeddings.register_forward_hook(enter)]
        handles += [block.register_forward_hook(leave) for block in blocks]
        loss = nn.functional.cross_entropy(self.network(**inputs).logits, labels)
        (entered, *clean), seen = seen, []
        (gradient,) = torch.autograd.grad(loss, entered)
        noise = 0.05 * entered.norm() * gradient / gradient.norm()
        self.network(**inputs)
        for handle in handles:
            handle.remove()
        return [
            float((b - a).detach().norm() / a.detach().norm())
            for a, b in zip(clean, seen[1:], strict=True)
        ]
