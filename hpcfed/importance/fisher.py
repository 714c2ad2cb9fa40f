"""Per-sample gradients of adapters from module hooks, and the Fisher information from them.

For y = x W^T + b the gradient of sample s is dW_s = sum over its positions of g x^T, db_s = sum of
g, with g the loss's gradient at y. Both x and g are at hand in an ordinary backward pass, so the
per-sample gradients of all adapters cost a small batched product each, at every ZeRO stage, where
param.grad holds only the batch's sum, or a rank's part of it.

A module that gives every sample a copy of its own values (prompts) is simpler still: the gradient
at a sample's copy is that sample's gradient.

Positions of padding need no care: nothing that the loss sees depends on them, so their g is zero.
The first dimension of x and y must be the samples, and samples must not touch (no batch norm).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

# index of the module, per-sample gradients of its weight (samples, *shape) and, if it has one, of
# its bias (samples, out), fp32
Consumer = Callable[[int, torch.Tensor, torch.Tensor | None], None]


class PerSampleGradients:
    """Hooks on linear modules, and on modules that give each sample a copy of their weight, which
    say so by an attribute `copies`; silent until `listen` names a consumer.

    The consumer gets each module's gradients once per backward, when the last of the module's uses
    in the forward has been passed, so a module used twice is added up before it is squared.
    Gradient checkpointing keeps its savings: x is a saved tensor like any other, dropped and
    recomputed.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._consumer: Consumer | None = None
        self._uses = [0] * len(modules)
        self._sums: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}
        self._in_backward = False
        for index, module in enumerate(modules):
            module.register_forward_hook(self._hook(index))

    def listen(self, consumer: Consumer | None) -> None:
        """Call before each forward, and `end_forward` after it; None ends it."""
        self._consumer = consumer
        self._uses = [0] * len(self._uses)
        self._sums.clear()
        self._in_backward = False

    def end_forward(self) -> None:
        """What runs from now on is backward, and what it recomputes is no further use."""
        self._in_backward = True

    def _hook(self, index: int) -> Callable[[nn.Module, Any, torch.Tensor], torch.Tensor | None]:
        def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
            if self._consumer is None or not torch.is_grad_enabled():
                return None
            if not self._in_backward:  # checkpointing runs forward again inside backward
                self._uses[index] += 1
            x = None if getattr(module, "copies", False) else inputs[0]
            bias = getattr(module, "bias", None)
            tapped: torch.Tensor = _Tap.apply(  # type: ignore[no-untyped-call]
                output, x, self, index, bias
            )
            return tapped

        return hook

    def receive(
        self, index: int, x: torch.Tensor | None, grad: torch.Tensor, has_bias: bool
    ) -> None:
        """One use of a module has been passed in backward."""
        if self._consumer is None:
            return
        rows = len(grad)
        bias = None
        if x is None:
            weight = grad.float()
        else:
            grad = grad.reshape(rows, -1, grad.shape[-1]).float()
            x = x.reshape(rows, -1, x.shape[-1]).float()
            weight = torch.bmm(grad.transpose(1, 2), x)
            bias = grad.sum(1) if has_bias else None
        if index in self._sums:
            old_weight, old_bias = self._sums.pop(index)
            weight += old_weight
            if bias is not None and old_bias is not None:
                bias += old_bias
        self._uses[index] -= 1
        if self._uses[index]:
            self._sums[index] = (weight, bias)
        else:
            self._consumer(index, weight, bias)


class _Tap(torch.autograd.Function):
    """The identity; in backward it hands on (x, gradient at y).

    x is kept through save_for_backward, not by the closure of a hook, because gradient
    checkpointing drops and recomputes only what was saved so.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        x: torch.Tensor | None,
        taps: PerSampleGradients,
        index: int,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.taps, ctx.index, ctx.has_bias = taps, index, bias is not None
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (grad,) = grads
        (x,) = ctx.saved_tensors
        ctx.taps.receive(ctx.index, x, grad.detach(), ctx.has_bias)
        return grad, None, None, None, None


class FisherSums:
    """A consumer that squares: the diagonal empirical Fisher of the batch, in two summaries.

    trace (samples,): sum over all values of (d log p(y_s|s) / d value)^2, the difficulty D(s).
    neurons[i] (n,): the squares of module i summed over samples and over each neuron's values, the
    neurons being the entries along this axis of the weight; axis None: not wanted.
    """

    def __init__(self, axes: Sequence[int | None], device: torch.device) -> None:
        self._axes = axes
        self._device = device
        self._factor = 1.0
        self.trace = torch.zeros(0)
        self.neurons: list[torch.Tensor | None] = [None] * len(axes)

    def batch(self, samples: int, scale: float) -> None:
        """Begin a batch whose samples' losses enter the loss with this factor."""
        self.trace = torch.zeros(samples, device=self._device)
        self._factor = 1 / scale**2

    def __call__(self, index: int, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Consume one module's per-sample gradients."""
        axis = self._axes[index]
        others = [d for d in range(1, weight.ndim) if d != 1 + (axis or 0)]
        squares = weight.square().sum(others) * self._factor  # (samples, neurons)
        self.trace += squares.sum(1)
        if bias is not None:
            self.trace += bias.square().sum(1) * self._factor
        if axis is not None:
            total = squares.sum(0)
            so_far = self.neurons[index]
            self.neurons[index] = total if so_far is None else so_far + total
