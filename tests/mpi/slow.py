"""The obvious versions: one sample at a time, no padding, plain PyTorch, none of hpcfed's hooks."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hpcfed import model
from hpcfed.data.batches import Ids, Tokens
from hpcfed.objectives.completion import Completion
from hpcfed.objectives.heads import Classifier, Cloze, Head, LabelWords
from hpcfed.settings.config import Config

CPU = torch.device("cpu")


def obvious_losses(
    network: Callable[..., torch.Tensor], head: Head, rows: Ids, tokens: Tokens
) -> torch.Tensor:
    """(len(rows),) losses from logits at all positions; each row by itself, without padding."""
    found = []
    for row in rows:
        ids = tokens.row(row).tolist()
        label = int(tokens.labels[row])
        if isinstance(head, LabelWords):
            ids = ids + list(head.words[label])
        batch = torch.tensor([ids])
        inputs = {"input_ids": batch, "attention_mask": torch.ones_like(batch)}
        if tokens.types is not None:
            types = tokens.types[tokens.offsets[row] : tokens.offsets[row + 1]]
            inputs["token_type_ids"] = torch.tensor([types.tolist()])
        logits = network(**inputs)[0]
        text = logits[-len(ids) :]  # virtual tokens may stand in front
        if isinstance(head, Classifier):
            wanted, picked = [label], logits[None]
        elif isinstance(head, Completion):
            assert tokens.answers is not None
            marks = tokens.answers[tokens.offsets[row] : tokens.offsets[row + 1]]
            places = [place for place, answer in enumerate(marks) if answer]
            wanted = [ids[place] for place in places]
            picked = torch.stack([text[place - 1] for place in places])
        elif isinstance(head, LabelWords):
            wanted = list(head.words[label])
            picked = text[len(ids) - 1 - len(wanted) : len(ids) - 1]
        else:
            assert isinstance(head, Cloze) and tokens.positions is not None
            wanted, picked = [head.words[label]], text[int(tokens.positions[row])][None]
        found.append(nn.functional.cross_entropy(picked, torch.tensor(wanted)))
    return torch.stack(found)


def _blocks(backbone: Any) -> Any:
    if hasattr(backbone, "encoder"):
        return backbone.encoder.layer
    return backbone.h if hasattr(backbone, "h") else backbone.layers


def _rms_norm(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    scale = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + module.variance_epsilon)
    return module.weight * hidden * scale


class Plain:
    """The adapted model, unsharded, as one function of its trainable vector."""

    def __init__(self, config: Config, labels: tuple[str, ...], head: Head | None = None) -> None:
        plain = replace(config.model, gradient_checkpointing=False)
        prepared = model.prepare(replace(config, model=plain), labels, 0, {})
        self.head = head or Classifier()
        self.initial = prepared.initial
        self.layout = prepared.adapted.layout
        self.network = prepared.adapted.network.eval()
        names = {id(p): name for name, p in self.network.named_parameters()}
        self._names = [names[id(p)] for p in prepared.adapted.parameters]

    def double(self) -> "Plain":
        """In float64, norms included, which LLaMA computes in fp32 whatever its type."""
        self.network.double()
        for module in self.network.modules():
            if isinstance(module, LlamaRMSNorm):
                module.forward = partial(_rms_norm, module)
        return self

    def losses(self, vector: torch.Tensor, rows: Ids, tokens: Tokens) -> torch.Tensor:
        """(len(rows),) losses, differentiable in `vector`."""
        values = {
            name: vector[entry.values].reshape(entry.shape)
            for name, entry in zip(self._names, self.layout.entries, strict=True)
        }

        def network(**inputs: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = torch.func.functional_call(self.network, values, kwargs=inputs)
            return logits

        return obvious_losses(network, self.head, rows, tokens)

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

    def outputs(self, vector: torch.Tensor, row: int, tokens: Tokens) -> list[torch.Tensor]:
        """(positions, hidden) of each block, for one sample without padding."""
        seen: list[torch.Tensor] = []
        handles = [
            block.register_forward_hook(
                lambda m, a, out: seen.append((out[0] if isinstance(out, tuple) else out)[0])
            )
            for block in _blocks(self._backbone())
        ]
        with torch.no_grad():
            self.losses(vector, np.array([row]), tokens)
        for handle in handles:
            handle.remove()
        return seen

    def alike(self, vector: torch.Tensor, rows: Ids, tokens: Tokens) -> list[float]:
        """Of each block: ln(lambda) + 1 / lambda, summed over numpy's eigenvalues of the cosines
        between the samples' outputs, one sample at a time."""
        outputs = [self.outputs(vector, int(row), tokens) for row in rows]
        found = []
        for block in range(len(outputs[0])):
            flat = [own[block].numpy().astype(np.float64) for own in outputs]
            longest = max(len(own) for own in flat)
            padded = [np.pad(own, ((0, longest - len(own)), (0, 0))).ravel() for own in flat]
            c = np.array([[a @ b / np.sqrt((a @ a) * (b @ b)) for a in padded] for b in padded])
            lam = np.maximum(np.linalg.eigvals(c).real, 0) + 1e-5
            found.append(float(np.sum(np.log(lam) + 1 / lam)))
        return found

    def _backbone(self) -> Any:
        inner: Any = self.network.backbone
        return (inner.get_base_model() if hasattr(inner, "peft_config") else inner).base_model

    def sensitivity(self, vector: torch.Tensor, row: int, tokens: Tokens) -> list[float]:
        """Relative change of each block's output under noise of 0.05 ||e|| along the gradient at
        the embeddings, one sample without padding."""
        with torch.no_grad():
            for name, entry in zip(self._names, self.layout.entries, strict=True):
                part = vector[entry.values].reshape(entry.shape)
                self.network.get_parameter(name).copy_(part)
        rows = np.array([row])
        backbone = self._backbone()
        blocks = _blocks(backbone)
        names = ("embeddings", "embed_tokens", "drop")
        embeddings = next(getattr(backbone, own) for own in names if hasattr(backbone, own))
        noise = torch.zeros(1)
        seen: list[torch.Tensor] = []

        def enter(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
            seen.append((output.detach() + noise).requires_grad_())
            return seen[-1]

        def leave(module: nn.Module, args: object, output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)

        handles = [embeddings.register_forward_hook(enter)]
        handles += [block.register_forward_hook(leave) for block in blocks]
        loss = obvious_losses(self.network, self.head, rows, tokens).sum()
        (entered, *clean), seen = seen, []
        (gradient,) = torch.autograd.grad(loss, entered)
        noise = 0.05 * entered.norm() * gradient / gradient.norm()
        obvious_losses(self.network, self.head, rows, tokens)
        for handle in handles:
            handle.remove()
        return [
            float((b - a).detach().norm() / a.detach().norm())
            for a, b in zip(clean, seen[1:], strict=True)
        ]
