"""What happens around each optimizer step, in the fp32 masters that DeepSpeed steps on.

Frozen values: a masked value is absent. Its gradient is zero before accumulation and before the
norm for clipping (a hook on the parameter, before DeepSpeed sees the gradient), so its moments stay
zero; and what the optimizer does regardless (weight decay) is undone after each of its steps.

Corrections: a constant vector, or a pull to where the round began, is added to the gradient that
the optimizer gets, after averaging over ranks and after clipping: clipping bounds what the data
say, not what is known about the other clients.

Importance: what a value matters to the loss, |w g| to first order, smoothed over the steps, and how
uncertain that is.

All of it works alike at every stage, because only masters are touched: the parameters themselves
at stage 0, flat fp32 partitions of this rank from stage 1 on.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

STEPS = "steps"  # beside an optimizer's moments, how many steps it had made

# How slowly importance and its uncertainty follow the steps: AdaLoRA's beta1 and beta2, in PEFT.
SMOOTH = 0.85


class Masters:
    """Hooks on the parameters and the torch optimizer of one DeepSpeed engine."""

    def __init__(self, parameters: Sequence[nn.Parameter], deepspeed: Any, stage: int) -> None:
        self._deepspeed = deepspeed
        self._stage = stage
        self._absent: list[torch.Tensor] = []  # a parameter's frozen values, in its full shape
        self._noise: dict[int, torch.Tensor] = {}  # by the parameter's number, likewise
        # All below by id of the master.
        self._frozen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._added: dict[int, torch.Tensor] = {}
        self._start: dict[int, torch.Tensor] = {}
        self._gradients: dict[int, torch.Tensor] = {}
        self._importance: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None
        self._pull = 0.0
        for index, parameter in enumerate(parameters):
            parameter.register_hook(self._gradient_hook(index))  # type: ignore[no-untyped-call]
        self._base = getattr(deepspeed.optimizer, "optimizer", deepspeed.optimizer)
        self._base.register_step_pre_hook(self._before)
        self._base.register_step_post_hook(self._after)

    def tensors(self) -> list[torch.Tensor]:
        """The fp32 tensors that the torch optimizer steps on: flat partitions from stage 1 on."""
        if self._stage == 3:  # the torch optimizer is lent one at a time
            return list(self._deepspeed.optimizer.fp32_partitioned_groups_flat)
        return [p for group in self._base.param_groups for p in group["params"]]

    def set_rate(self, rate: float) -> None:
        """The learning rate from now on."""
        for group in self._base.param_groups:
            group["lr"] = rate

    def copies(self) -> list[torch.Tensor]:
        """What they hold now: a vector that was written into the engine, in the masters' order."""
        return [master.detach().clone() for master in self.tensors()]

    def fill(self, parts: Sequence[torch.Tensor]) -> None:
        """Make them hold these, to be read out in the layout's order."""
        for master, part in zip(self.tensors(), parts, strict=True):
            master.data.copy_(part)

    def release(self) -> None:
        """Nothing is frozen, corrected, or remembered of earlier steps."""
        self._absent, self._pull, self._noise = [], 0.0, {}
        self._importance = None
        self._frozen, self._added, self._start, self._gradients = {}, {}, {}, {}
        self._base.state.clear()

    def freeze(self, absent: Sequence[torch.Tensor], where: Sequence[torch.Tensor]) -> None:
        """From now on these values stay as they are.

        absent: per parameter, bool in its full shape. where: per master, bool, the same values in
        the master's own order. Call with the values to keep in the engine.
        """
        self._absent = list(absent)
        self._frozen = {
            id(master): (mask, master.detach().clone())
            for master, mask in zip(self.tensors(), where, strict=True)
        }

    def disturb(self, noise: Sequence[torch.Tensor] | None) -> None:
        """Add these, per parameter in its full shape, to the next gradient; once."""
        self._noise = {} if noise is None else dict(enumerate(noise))

    def pull(self, strength: float) -> None:
        """Add strength * (value - its value now) to each gradient: the proximal term."""
        self._pull = strength
        self._start = {id(m): m.detach().clone() for m in self.tensors()}

    def add(self, parts: Sequence[torch.Tensor]) -> None:
        """Add these to each gradient, and sum up the gradients as they are without them."""
        self._added = {id(m): part for m, part in zip(self.tensors(), parts, strict=True)}

    def gradients(self) -> list[torch.Tensor]:
        """The sum of all gradients since `add`."""
        return [self._gradients.get(id(m), torch.zeros_like(m)) for m in self.tensors()]

    def sense(self) -> None:
        """From now on note how much values matter: I <- b I + (1 - b) |w g|, and its uncertainty
        U <- b U + (1 - b) | |w g| - I |, with the gradient that the optimizer gets."""
        self._importance = {}

    def importance(self, steps: int) -> list[torch.Tensor]:
        """I U after so many steps, both as averages whose weights add up to 1."""
        assert self._importance is not None
        whole = (1 - SMOOTH**steps) ** 2 if steps else 1.0
        pairs = [self._importance.get(id(master)) for master in self.tensors()]
        return [
            torch.zeros_like(master) if pair is None else pair[0] * pair[1] / whole
            for master, pair in zip(self.tensors(), pairs, strict=True)
        ]

    def set_moments(self, moments: dict[str, list[torch.Tensor]], steps: int) -> None:
        """Give the optimizer what it remembered `steps` steps into an earlier round."""
        for index, master in enumerate(self.tensors()):
            state = {name: parts[index] for name, parts in moments.items()}
            self._base.state[master] = {"step": torch.tensor(float(steps)), **state}

    def moments(self) -> dict[str, list[torch.Tensor]]:
        """What the optimizer remembers: for Adam exp_avg and exp_avg_sq, for SGD its momentum."""
        by_name: dict[str, list[torch.Tensor]] = {}
        for master in self.tensors():
            for name, value in self._base.state[master].items():
                if torch.is_tensor(value) and value.shape == master.shape:
                    by_name.setdefault(name, []).append(value.detach())
        return by_name

    def _gradient_hook(self, index: int) -> Any:
        def hook(gradient: torch.Tensor) -> torch.Tensor | None:
            noise = self._noise.pop(index, None)
            if noise is not None:
                gradient = gradient + noise
                return gradient.masked_fill(self._absent[index], 0) if self._absent else gradient
            return gradient.masked_fill(self._absent[index], 0) if self._absent else None

        return hook

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for master in group["params"]:
                if self._pull or self._added:
                    self._correct(master)
                if self._importance is not None:
                    self._sense(master, self._importance)

    @staticmethod
    def _sense(master: torch.Tensor, seen: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> None:
        assert master.grad is not None
        now = (master.detach() * master.grad).abs()
        old, unsure = seen.get(id(master)) or (torch.zeros_like(now), torch.zeros_like(now))
        smooth = SMOOTH * old + (1 - SMOOTH) * now
        seen[id(master)] = smooth, SMOOTH * unsure + (1 - SMOOTH) * (now - smooth).abs()

    def _correct(self, master: torch.Tensor) -> None:
        gradient, key = master.grad, id(master)
        assert gradient is not None
        if self._added:
            so_far = self._gradients.get(key)
            self._gradients[key] = gradient.clone() if so_far is None else so_far + gradient
            gradient = gradient + self._added[key]
        if self._pull:
            gradient = gradient + self._pull * (master.detach() - self._start[key])
        if key in self._frozen:
            gradient = gradient.masked_fill(self._frozen[key][0], 0)
        master.grad = gradient

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not self._frozen:
            return
        for group in optimizer.param_groups:
            for master in group["params"]:
                mask, values = self._frozen[id(master)]
                master.data.copy_(torch.where(mask, values, master.data))
