"""Instruction tuning: a decoder answers prompts, and only its answers are trained.

A row's loss is the mean over the tokens of its answers, and a batch's the mean over its rows: each
row weighs the same, however long its answer, as each does in what clients send. What is reported,
loss and perplexity, is over all tokens of the answers that were evaluated.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from hpcfed.data import rendering
from hpcfed.data.answers import check_installed
from hpcfed.data.batches import Choice, Floats, Ids, Tokens
from hpcfed.data.instructions import Example
from hpcfed.data.sources import Split, TaskData
from hpcfed.objectives.heads import Forward, Inputs
from hpcfed.settings.config import Config


@dataclass(frozen=True)
class Completion:
    """Logits over the vocabulary at the tokens of answers. ends: tokens that end one."""

    template: rendering.Template
    ends: tuple[int, ...]

    model_class: ClassVar[str] = "AutoModelForCausalLM"
    trains_head: ClassVar[bool] = False
    columns: ClassVar[tuple[str, ...]] = ("summed", "tokens", "chosen", "loss")

    @classmethod
    def build(cls, config: Config, task: TaskData, tokenizer: Any) -> "Completion":
        """With the tokenizer's chat template, or the plain one."""
        if config.evaluation.max_new_tokens:
            check_installed()
        plain = config.task.chat_template == "plain"
        template = rendering.Template(tokenizer, plain, config.model.name)
        return cls(template, template.ends)

    def encode(self, split: Split, tokenizer: Any, max_length: int) -> Tokens:
        """Conversations by the template; one that is too long loses its beginning. Where rows offer
        answers to choose from, each of them in its place too."""
        examples = [Example.of(text) for text in split.texts]
        encode = partial(rendering.encode, split, self.template, tokenizer.pad_token_id, max_length)
        choices = []
        for number in range(max(len(own.choices) for own in examples)):
            offered = [own.choices[number : number + 1] or ("",) for own in examples]
            answers = [
                own.choices[number] if number < len(own.choices) else own.answer for own in examples
            ]
            characters = np.array([len(text) for (text,) in offered], dtype=np.int64)
            right = [own.answer == text for own, (text,) in zip(examples, offered, strict=True)]
            choices.append(Choice(encode(answers), characters, np.array(right)))
        wanted = tuple(own.answer for own in examples)
        return replace(encode(), choices=tuple(choices), right=wanted)

    def inputs(self, tokens: Tokens, rows: Ids, device: torch.device) -> Inputs:
        """Ids, mask, and the places (rows, most answer tokens) that predict the answers' tokens."""
        return self._asked(tokens, rows, device)[0]

    def losses(
        self, network: Forward, tokens: Tokens, rows: Ids, device: torch.device
    ) -> torch.Tensor:
        """Mean over the answers' tokens of their cross-entropy."""
        summed, number = self._summed(network, tokens, rows, device)
        return summed / number

    def predict(
        self, network: Forward, tokens: Tokens, rows: Ids, device: torch.device
    ) -> torch.Tensor:
        """Cross-entropy of the answers, their tokens, whether of the answers to choose from the
        right one is the likeliest (-1 where there are none), and the mean of the first over the
        second."""
        summed, number = self._summed(network, tokens, rows, device)
        chosen = self._chosen(network, tokens, rows, device)
        return torch.stack([own.double() for own in (summed, number, chosen, summed / number)])

    def _chosen(
        self, network: Forward, tokens: Tokens, rows: Ids, device: torch.device
    ) -> torch.Tensor:
        """(rows,): 1 or 0, or -1. An answer's log-likelihood is divided by its characters, as in
        lm_eval's acc_norm, or a short answer would win by being short."""
        if not tokens.choices:
            return torch.full((len(rows),), -1.0, device=device)
        likely, right = [], []
        for own in tokens.choices:
            summed, _ = self._summed(network, own.tokens, rows, device)
            characters = torch.from_numpy(own.characters[rows]).to(device)
            normalised = -summed / characters.clamp(min=1)
            likely.append(normalised.masked_fill(characters == 0, -torch.inf))
            right.append(torch.from_numpy(own.right[rows]).to(device))
        best = torch.stack(likely).argmax(0, keepdim=True)
        hit = torch.stack(right).gather(0, best)[0].float()
        return hit.masked_fill(torch.stack(likely)[0] == -torch.inf, -1.0)

    def score(self, told: Floats, rows: Ids, tokens: Tokens, task: TaskData) -> dict[str, Any]:
        """Loss and perplexity over all tokens of answers; of rows with answers to choose from, the
        share whose right one is the likeliest."""
        loss = float(told[0].sum() / told[1].sum())
        scores = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "score": -loss}
        chosen = told[2][told[2] >= 0]
        return {**scores, "multiple_choice": float(chosen.mean())} if len(chosen) else scores

    def _summed(
        self, network: Forward, tokens: Tokens, rows: Ids, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows,) each: the summed cross-entropy of a row's answers, and their tokens."""
        inputs, wanted = self._asked(tokens, rows, device)
        # Flat, as losses over the last dimension are several times faster.
        logits = network(**inputs).flatten(0, 1).float()
        losses = nn.functional.cross_entropy(
            logits, wanted.flatten(), reduction="none", ignore_index=-1
        )
        return losses.view_as(wanted).sum(1), (wanted >= 0).sum(1)

    def _asked(
        self, tokens: Tokens, rows: Ids, device: torch.device
    ) -> tuple[Inputs, torch.Tensor]:
        """Inputs, and the tokens that their positions predict, -1 where a row has fewer."""
        inputs = tokens.collate(rows, device)
        places = [rendering.targets(tokens, int(row)) for row in rows]
        longest = max(map(len, places))
        positions = np.zeros((len(rows), longest), dtype=np.int64)
        wanted = np.full_like(positions, -1)
        for number, (row, own) in enumerate(zip(rows, places, strict=True)):
            positions[number, : len(own)] = own - 1  # a token is predicted at the one before it
            wanted[number, : len(own)] = tokens.row(int(row))[own]
        inputs["positions"] = torch.from_numpy(positions).to(device)
        return inputs, torch.from_numpy(wanted).to(device)
