"""The server's side of a round: a rule for the step, and control variates; on flat tensors, the
same on every rank.

w: what the server handed out, w_i: what client i returns, with weight n_i in the mean; wbar = sum
n_i w_i / n_S; Delta = w - wbar, the pseudo-gradient. A rule is a class with `step(shared, w, wbar,
control)`; ours are in mean.py, momentum.py, adaptive.py.
"""

from typing import Protocol

import torch

from hpcfed import registry
from hpcfed.adapters.layout import AdapterLayout, Part
from hpcfed.round import Outcome
from hpcfed.server.memory import Memory
from hpcfed.server.variates import Sampled, configured
from hpcfed.settings.config import Config
from hpcfed.state import ServerState


class Rule(Protocol):
    """What is made of the clients' mean. Constructed with the configuration and the memory."""

    def step(
        self, shared: Part, w: torch.Tensor, wbar: torch.Tensor, control: torch.Tensor
    ) -> torch.Tensor:
        """(n,) the next values of the shared part, from those handed out (n,), their mean (n,) and
        the control term (n,), zero without control variates."""


class Optimizer:
    """The configured server step."""

    def __init__(self, config: Config, layout: AdapterLayout, state: ServerState) -> None:
        self._memory = Memory(layout, state, config.server.lr_decay)
        self._rule: Rule = registry.SERVERS[config.server.optimizer](config, self._memory)
        self.variates = configured(config)(config, self._memory)

    def message(
        self,
        shared: Part,
        w: torch.Tensor,
        outcome: Outcome,
        variate: torch.Tensor | None,
        weight: int,
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """What a client adds to the exchange besides its values, each (n,); and its control variate
        after the round (size,), if it has one.

        w (size,): what the server handed out. variate: before the round (size,), None at first.
        """
        w = shared.pack(w)
        before = torch.zeros_like(w) if variate is None else shared.pack(variate)
        sent, after = self.variates.message(shared, w, outcome, before, weight)
        return sent, None if after is None else self._memory.spread(after, shared, variate)

    def step(
        self, shared: Part, w: torch.Tensor, means: torch.Tensor, sampled: Sampled
    ) -> torch.Tensor:
        """(n,) the next round's values of the shared part, from those handed out (size,) and the
        exchange's means ((1 + variates.sums) * n,). Nothing changes if every client failed."""
        w = shared.pack(w)
        if not sampled.clients:
            return w
        wbar, *extras = torch.split(means, len(w))
        control = self.variates.update(shared, w - wbar, extras, sampled)
        return self._rule.step(shared, w, wbar, control)
