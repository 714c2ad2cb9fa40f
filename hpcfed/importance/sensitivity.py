"""How much each transformer block's output moves under the worst-case noise on its input.

FibecFed scores layers by noise on the input and the difference in each layer's output; the norms
are our reading. e is the input of the first block (the embeddings after their LayerNorm).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

RADIUS = 0.05  # of the noise, relative to the norm of e


class BlockWatch:
    """Sees the hidden states that enter the first block and leave each block, in `watch`."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.blocks = blocks
        self._noise: torch.Tensor | None = None
        self._reduce: Callable[[torch.Tensor], torch.Tensor] | None = None
        self.entered: torch.Tensor | None = None
        self.left: list[torch.Tensor] = []

    @contextmanager
    def watch(
        self,
        noise: torch.Tensor | None = None,
        outputs: bool = True,
        reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> Iterator[None]:
        """During it, `entered` is differentiable, `left` collects the outputs if wanted, or what
        `reduce` makes of each, and `noise` (samples, positions, hidden) is added to what enters the
        first block."""
        self._noise, self.entered, self.left = noise, None, []
        self._reduce = reduce
        handles = [self.blocks[0].register_forward_pre_hook(self._enter, with_kwargs=True)]
        if outputs:
            handles += [block.register_forward_hook(self._leave) for block in self.blocks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            # Activations of all blocks: gone with the last use of them outside.
            self._noise, self.entered, self.left = None, None, []

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        if self._noise is not None:
            hidden = hidden + self._noise.to(hidden.dtype)
            return (
                ((hidden, *args[1:]), kwargs)
                if args
                else (args, {**kwargs, "hidden_states": hidden})
            )
        # In place, so that checkpointing, which calls this again with the same tensor, finds it so.
        if torch.is_grad_enabled() and not hidden.requires_grad:
            hidden.requires_grad_()
        self.entered = hidden
        return None

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        hidden = (output[0] if isinstance(output, tuple) else output).detach()
        self.left.append(self._reduce(hidden) if self._reduce else hidden)


def worst_case_noise(
    entered: torch.Tensor, gradient: torch.Tensor, mask: torch.Tensor, p: float = 2.0
) -> torch.Tensor:
    """The noise in a p-ball that raises each sample's loss most, to first order.

    entered, gradient: (samples, positions, hidden); mask (samples, positions), 1 where a token is.
    With eps = RADIUS * ||e_s||_2 and 1/p + 1/q = 1:
    delta_s = eps * sign(g_s) |g_s|^(q-1) / ||g_s||_q^(q-1); zero at padding, and for a sample
    whose gradient is zero. p > 1. Returns fp32.
    """
    inside = mask.unsqueeze(-1).float()
    e, g = entered.detach().float() * inside, gradient.float() * inside
    eps = RADIUS * e.flatten(1).norm(dim=1)
    q = p / (p - 1)
    # Scaled by the largest, so that powers of tiny gradients do not vanish.
    largest = g.flatten(1).abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny)
    g = g / largest[:, None, None]
    power = g.sign() * g.abs().pow(q - 1)
    norm = g.flatten(1).norm(p=q, dim=1).pow(q - 1)
    return power * torch.where(norm > 0, eps / norm.clamp_min(1e-30), 0)[:, None, None]


def relative_change(
    clean: Sequence[torch.Tensor], noisy: Sequence[torch.Tensor], mask: torch.Tensor
) -> torch.Tensor:
    """(samples, layers): ||h_l(e + delta) - h_l(e)||_F / ||h_l(e)||_F per sample, padding left out.

    clean, noisy: a (samples, positions, hidden) output per layer; mask (samples, positions).
    """
    inside = mask.unsqueeze(-1).float()
    return torch.stack(
        [
            ((b.float() - a.float()) * inside).flatten(1).norm(dim=1)
            / (a.float() * inside).flatten(1).norm(dim=1)
            for a, b in zip(clean, noisy, strict=True)
        ],
        dim=1,
    )
