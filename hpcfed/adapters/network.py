"""The network that an engine runs: backbone, prompts in front of it, logits only where wanted."""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache


class Penalty:
    """What an adapter adds to the loss of a step by its values alone, as a gradient.

    share: of it, in this forward: a step of several has it once.
    """

    def __init__(self) -> None:
        self.share = 1.0

    def attached(self, output: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        """The output of a module, whose backward is this loss's too."""
        both: torch.Tensor = _Attached.apply(output, self.share * loss)  # type: ignore[no-untyped-call]
        return both


class _Attached(torch.autograd.Function):
    """The identity; a scalar beside it gets the gradient of a term of the loss."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (grad,) = grads
        return grad, torch.ones((), device=grad.device)


class Network(nn.Module):
    """A Hugging Face model, adapted, as one function of token ids.

    backbone: the model, or PEFT's wrapper around it; inner: the model itself. prompts rewrites the
    inputs, see hpcfed.adapters.prompts. lead: virtual tokens in front of every text. penalty: what
    the adapter adds to the loss.

    anchor: zeros (samples,) of the last forward, which prompts add to their values. Nothing in
    front of a prompt depends on the text, so this is where a backward pass through prompts ends
    that shall not end in parameters; and ZeRO-3 learns from it that a prompt's backward is over.
    """

    def __init__(
        self, backbone: nn.Module, inner: Any, prompts: Any | None, penalty: Penalty | None = None
    ) -> None:
        super().__init__()
        self.penalty = penalty
        self.backbone = backbone
        # In a list, or its parameters would have two names.
        self._inner = [inner]
        self.prompts = prompts
        self.anchor: torch.Tensor | None = None
        self.lead = 0 if prompts is None else prompts.lead
        self._positions: torch.Tensor | None = None
        self._picked = False
        inner.base_model.register_forward_hook(self._pick)

    @property
    def inner(self) -> Any:
        """The Hugging Face model, without PEFT's wrapper."""
        return self._inner[0]

    def forward(
        self,
        positions: torch.Tensor | None = None,
        past: DynamicCache | None = None,
        **inputs: torch.Tensor,
    ) -> torch.Tensor:
        """Logits: (samples, classes) of a classifier; of a language model (samples, n, vocabulary)
        at `positions` (samples, n) of the text, or at all of them; with `past` at the last one.

        inputs: input_ids (samples, longest), and perhaps attention_mask, where there is padding,
        and token_type_ids.
        past: what a decoder has read so far, to which this forward adds; the inputs are the ids
        that follow, and the mask, which may begin with padding, of all.
        """
        if "attention_mask" not in inputs and (self.prompts is not None or past is not None):
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        prepared: dict[str, Any] = dict(inputs)
        if self.prompts is not None and (past is None or not past.get_seq_length()):
            ids = inputs["input_ids"]
            self.anchor = torch.zeros(
                len(ids), device=ids.device, requires_grad=torch.is_grad_enabled()
            )
            self._positions = None  # prompts may be made by a forward of their own
            prepared = self.prompts(inputs, self.anchor)
        self._positions = None if positions is None else positions + self.lead
        if past is not None:
            prepared = self._following(prepared, past)
            last = prepared["input_ids"].shape[1] - 1
            self._positions = torch.full_like(prepared["input_ids"][:, :1], last)
        self._picked = False
        logits: torch.Tensor = self.backbone(**prepared).logits
        if self._positions is not None and not self._picked:
            # The head took its hidden states past the module that `_pick` listens to.
            index = self._positions.unsqueeze(-1).expand(-1, -1, logits.shape[-1])
            logits = logits.gather(1, index)
        return logits

    def _following(self, prepared: dict[str, Any], past: DynamicCache) -> dict[str, Any]:
        """The inputs, behind `past`; positions count what is no padding."""
        prefix = prepared.get("past_key_values")
        for index, layer in enumerate(prefix.layers if prefix is not None else ()):
            past.update(layer.keys, layer.values, index)
        length = prepared["input_ids"].shape[1]
        mask = prepared["attention_mask"]
        virtual = past.get_seq_length() + length - mask.shape[1]  # of an earlier forward
        mask = nn.functional.pad(mask, (virtual, 0), value=1)
        following = {**prepared, "attention_mask": mask, "past_key_values": past, "use_cache": True}
        if "position_ids" in inspect.signature(self.inner.forward).parameters:
            following["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -length:]
        return following

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Meanwhile it is the model without its LoRA and without dropout. The modules run as ever,
        since ZeRO-3 fetches what it saw run before; what they add is scaled to nothing."""
        training = self.training
        found: list[Any] = [getattr(module, "scaling", None) for module in self.modules()]
        scales: list[dict[str, float]] = [own for own in found if isinstance(own, dict)]
        kept = [dict(own) for own in scales]
        self.eval()
        for own in scales:
            own.update(dict.fromkeys(own, 0.0))
        try:
            yield
        finally:
            for own, before in zip(scales, kept, strict=True):
                own.update(before)
            self.train(training)

    def _pick(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Of the hidden states (samples, longest, hidden) keep those that logits are wanted of: a
        vocabulary's worth of logits at every position is the largest tensor of a training step."""
        if self._positions is not None:
            hidden = output.last_hidden_state
            index = self._positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
            output.last_hidden_state = hidden.gather(1, index)
            self._picked = True
        return output


def recompute(blocks: Iterable[nn.Module]) -> None:
    """Gradient checkpointing: keep only what enters these blocks, run them again in backward.

    Not transformers' own, which drops past_key_values, and with them every prefix, without a word.
    """
    for block in blocks:
        block.forward = _recomputed(block.forward)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        return forward(*args, **kwargs)

    return run
