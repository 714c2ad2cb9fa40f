"""Direct preference optimization (Rafailov et al. 2023): of two answers the better one is to become
likelier than it was, beside the worse one.

-log sigmoid(beta ((log p(chosen) - log q(chosen)) - (log p(rejected) - log q(rejected)))), log p of
an answer summed over its tokens; q is the model with its adapter off.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

from hpcfed.data import rendering
from hpcfed.data.batches import Floats, Ids, Tokens
from hpcfed.data.instructions import Example
from hpcfed.data.sources import Split, TaskData
from hpcfed.objectives.completion import Completion
from hpcfed.objectives.heads import Forward
from hpcfed.settings.config import Config


@dataclass(frozen=True)
class Preference(Completion):
    """Two answers a row: that of its tokens, and that of `tokens.worse`."""

    beta: float = 0.1

    columns: ClassVar[tuple[str, ...]] = ("preferred", "loss")

    @classmethod
    def build(cls, config: Config, task: TaskData, tokenizer: Any) -> "Preference":
        """With the tokenizer's chat template, or the plain one."""
        own = Completion.build(config, task, tokenizer)
        return cls(own.template, own.ends, config.task.beta)

    def encode(self, split: Split, tokenizer: Any, max_length: int) -> Tokens:
        """Each prompt with its better answer; in `worse` with the other one."""
        rejected = [Example.of(text).rejected or "" for text in split.texts]
        pad = tokenizer.pad_token_id
        better = rendering.encode(split, self.template, pad, max_length)
        worse = rendering.encode(split, self.template, pad, max_length, rejected)
        return replace(better, worse=worse, cut=max(better.cut, worse.cut))

    def losses(
        self, network: Forward, tokens: Tokens, rows: Ids, device: torch.device
    ) -> torch.Tensor:
        """-log sigmoid of beta times the margin."""
        return -nn.functional.logsigmoid(self._margins(network, tokens, rows, device))

    def predict(
        self, network: Forward, tokens: Tokens, rows: Ids, device: torch.device
    ) -> torch.Tensor:
        """Whether the better answer has gained on the worse one, and the loss."""
        margins = self._margins(network, tokens, rows, device)
        losses = -nn.functional.logsigmoid(margins)
        return torch.stack([(margins > 0).double(), losses.double()])

    def score(self, told: Floats, rows: Ids, tokens: Tokens, task: TaskData) -> dict[str, Any]:
        """The share of rows whose better answer has gained on the worse one."""
        share = float(told[0].mean())
        return {"preference": share, "score": share, "loss": float(told[1].mean())}

    def _margins(
        self, network: Any, tokens: Tokens, rows: Ids, device: torch.device
    ) -> torch.Tensor:
        """(rows,): beta times how far the answers' log-probabilities have moved apart."""
        assert tokens.worse is not None
        pair = (tokens, tokens.worse)
        with torch.no_grad(), network.reference():
            before = [self._summed(network, own, rows, device)[0] for own in pair]
        # Two forwards, not one of twice the rows: hooks take a forward's first dimension for rows.
        better, worse = (self._summed(network, own, rows, device)[0] for own in pair)
        return self.beta * ((worse - before[1]) - (better - before[0]))
