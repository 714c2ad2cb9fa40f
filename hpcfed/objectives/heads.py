"""What turns the network's output into a loss and a prediction: the three heads.

classifier: a trained linear layer over the classes. cloze: a masked language model fills the gap
of a template; cross-entropy over the vocabulary, prediction among the labels' words. label_words: a
decoder goes on from the template; the label whose word has the lowest mean token loss wins.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import nn

from hpcfed import registry
from hpcfed.data import gaps, metrics, wordings
from hpcfed.data.batches import Floats, Ids, Tokens, flatten, tokenize
from hpcfed.data.sources import Split, TaskData
from hpcfed.errors import UserError
from hpcfed.settings.config import Config

# The network, or the engine around it.
Forward = Callable[..., torch.Tensor]
Inputs = dict[str, torch.Tensor]


class Head(Protocol):
    """An objective: how rows become inputs, and logits losses and scores. Losses are fp32.

    model_class: the class of transformers that loads the model, as AutoModelForCausalLM.
    trains_head: the model's final linear layer, one output per label, is trained, and shared.
    columns: what `predict` tells of each row; the last is its loss.
    """

    model_class: ClassVar[str]
    trains_head: ClassVar[bool]
    columns: ClassVar[tuple[str, ...]]

    @classmethod
    def build(cls, config: Config, task: TaskData, tokenizer: Any) -> "Head":
        """The configured objective. Raises UserError if it does not fit task and tokenizer."""

    def encode(self, split: Split, tokenizer: Any, max_length: int) -> Tokens:
        """Token ids of a split. Raises UserError for rows that cannot be encoded."""

    def inputs(self, tokens: Tokens, rows: Ids, device: torch.device) -> Inputs:
        """What the network takes in training: ids and mask (rows, longest), and positions."""

    def losses(
        self, network: Forward, tokens: Tokens, rows: Ids, device: torch.device
    ) -> torch.Tensor:
        """(rows,) differentiable loss of each row's true label."""

    def predict(
        self, network: Forward, tokens: Tokens, rows: Ids, device: torch.device
    ) -> torch.Tensor:
        """(columns, rows) float64 of each row, as a class that is predicted and its loss."""

    def score(self, told: Floats, rows: Ids, tokens: Tokens, task: TaskData) -> dict[str, Any]:
        """Metrics of these rows from what predict told, (columns, len(rows)); `score` is the one
        that counts, the higher the better, and `loss` the mean loss."""


class Classifies:
    """What the objectives that predict a class have in common."""

    columns: ClassVar[tuple[str, ...]] = ("predicted", "loss")
    trains_head: ClassVar[bool] = False

    def score(self, told: Floats, rows: Ids, tokens: Tokens, task: TaskData) -> dict[str, Any]:
        """Accuracy, and what else the task asks for."""
        predicted = told[0].astype(np.int64)
        scores = metrics.score(predicted, tokens.labels[rows], task.metric, task.positive)
        return {**scores, "loss": float(told[1].mean())}


def _told(classes: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
    return torch.stack([classes.double(), losses.double()])


@dataclass(frozen=True)
class Classifier(Classifies):
    """Logits over the classes."""

    model_class: ClassVar[str] = "AutoModelForSequenceClassification"
    trains_head: ClassVar[bool] = True

    @classmethod
    def build(cls, config: Config, task: TaskData, tokenizer: Any) -> "Classifier":
        """Nothing to fit."""
        return cls()

    def encode(self, split: Split, tokenizer: Any, max_length: int) -> Tokens:
        """Texts or pairs as they are; pairs are cut longest-first."""
        return tokenize(split, tokenizer, max_length)

    def inputs(self, tokens: Tokens, rows: Ids, device: torch.device) -> Inputs:
        """Ids, mask and, for pairs, token types."""
        return tokens.collate(rows, device)

    def losses(
        self, network: Forward, tokens: Tokens, rows: Ids, device: torch.device
    ) -> torch.Tensor:
        """Cross-entropy over the classes."""
        logits = network(**self.inputs(tokens, rows, device)).float()
        return nn.functional.cross_entropy(logits, _labels(tokens, rows, device), reduction="none")

    def predict(
        self, network: Forward, tokens: Tokens, rows: Ids, device: torch.device
    ) -> torch.Tensor:
        """The class with the largest logit."""
        logits = network(**self.inputs(tokens, rows, device)).float()
        losses = nn.functional.cross_entropy(
            logits, _labels(tokens, rows, device), reduction="none"
        )
        return _told(logits.argmax(-1), losses)


@dataclass(frozen=True)
class Cloze(Classifies):
    """Logits over the vocabulary in the gap. words: the token of each label."""

    wording: wordings.Wording
    words: tuple[int, ...]

    model_class: ClassVar[str] = "AutoModelForMaskedLM"

    @classmethod
    def build(cls, config: Config, task: TaskData, tokenizer: Any) -> "Cloze":
        """With the task's wording; each label's word must be one token."""
        wording = wordings.wording(config, task)
        return cls(wording, wordings.single_tokens(wording, tokenizer))

    def encode(self, split: Split, tokenizer: Any, max_length: int) -> Tokens:
        """The template around each row, with its gap."""
        return gaps.encode(split, self.wording, tokenizer, max_length, ends=False)

    def inputs(self, tokens: Tokens, rows: Ids, device: torch.device) -> Inputs:
        """Ids, mask, and the gap's position (rows, 1)."""
        assert tokens.positions is not None
        positions = torch.from_numpy(tokens.positions[rows]).unsqueeze(1).to(device)
        return {**tokens.collate(rows, device), "positions": positions}

    def losses(
        self, network: Forward, tokens: Tokens, rows: Ids, device: torch.device
    ) -> torch.Tensor:
        """Cross-entropy over the whole vocabulary, of the label's word in the gap."""
        logits = network(**self.inputs(tokens, rows, device))[:, 0].float()
        return self._loss(logits, tokens, rows, device)

    def _loss(
        self, logits: torch.Tensor, tokens: Tokens, rows: Ids, device: torch.device
    ) -> torch.Tensor:
        words = torch.tensor(self.words, device=device)
        wanted = words[_labels(tokens, rows, device)]
        return nn.functional.cross_entropy(logits, wanted, reduction="none")

    def predict(
        self, network: Forward, tokens: Tokens, rows: Ids, device: torch.device
    ) -> torch.Tensor:
        """The likeliest of the labels' words."""
        logits = network(**self.inputs(tokens, rows, device))[:, 0].float()
        losses = self._loss(logits, tokens, rows, device)
        return _told(logits[:, list(self.words)].argmax(-1), losses)


@dataclass(frozen=True)
class LabelWords(Classifies):
    """Logits over the vocabulary where a label's word goes on from the text."""

    wording: wordings.Wording
    words: tuple[tuple[int, ...], ...]

    model_class: ClassVar[str] = "AutoModelForCausalLM"

    @classmethod
    def build(cls, config: Config, task: TaskData, tokenizer: Any) -> "LabelWords":
        """With the task's wording; a text must fit before the longest word."""
        wording = wordings.wording(config, task)
        words = wordings.continuations(wording, tokenizer)
        if max(map(len, words)) >= config.task.max_length:
            raise UserError("task.max_length leaves no room for a text before the label's word.")
        return cls(wording, words)

    def encode(self, split: Split, tokenizer: Any, max_length: int) -> Tokens:
        """The template up to its gap, with room left for the longest word."""
        room = max_length - max(map(len, self.words))
        return gaps.encode(split, self.wording, tokenizer, room, ends=True)

    def inputs(self, tokens: Tokens, rows: Ids, device: torch.device) -> Inputs:
        """Each text with its true label's word, as in training."""
        return self._continued(tokens, rows, tokens.labels[rows], device)[0]

    def losses(
        self, network: Forward, tokens: Tokens, rows: Ids, device: torch.device
    ) -> torch.Tensor:
        """Mean over the word's tokens of their cross-entropy."""
        return self._mean_loss(network, tokens, rows, tokens.labels[rows], device)

    def predict(
        self, network: Forward, tokens: Tokens, rows: Ids, device: torch.device
    ) -> torch.Tensor:
        """The label with the lowest loss; one forward per label."""
        each = [
            self._mean_loss(network, tokens, rows, np.full(len(rows), label), device)
            for label in range(len(self.words))
        ]
        losses = torch.stack(each, dim=1)
        true = _labels(tokens, rows, device).unsqueeze(1)
        return _told(losses.argmin(1), losses.gather(1, true).squeeze(1))

    def _mean_loss(
        self, network: Forward, tokens: Tokens, rows: Ids, labels: Ids, device: torch.device
    ) -> torch.Tensor:
        inputs, targets = self._continued(tokens, rows, labels, device)
        # Flat: over another dimension than the last it is slow, and on a GPU in no fixed order.
        logits = network(**inputs).flatten(0, 1).float()
        losses = nn.functional.cross_entropy(
            logits, targets.flatten(), reduction="none", ignore_index=-1
        )
        return losses.view_as(targets).sum(1) / (targets >= 0).sum(1)

    def _continued(
        self, tokens: Tokens, rows: Ids, labels: Ids, device: torch.device
    ) -> tuple[Inputs, torch.Tensor]:
        """Inputs in which label labels[i]'s word follows text rows[i], positions (rows, longest
        word) that predict its tokens, and the tokens, -1 where a word is shorter."""
        words = [self.words[int(label)] for label in labels]
        joined = [[*tokens.row(row), *word] for row, word in zip(rows, words, strict=True)]
        inputs = flatten(joined, labels, tokens.pad_id).collate(np.arange(len(rows)), device)
        longest = max(map(len, words))
        targets = np.full((len(rows), longest), -1, dtype=np.int64)
        for target, word in zip(targets, words, strict=True):
            target[: len(word)] = word
        # The token at p is predicted at p - 1; where a word is shorter, any place will do.
        first = tokens.lengths[rows, None] - 1
        positions = np.minimum(first + np.arange(longest), inputs["input_ids"].shape[1] - 1)
        inputs["positions"] = torch.from_numpy(positions).to(device)
        return inputs, torch.from_numpy(targets).to(device)


def _labels(tokens: Tokens, rows: Ids, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(tokens.labels[rows]).to(device)


def build(config: Config, task: TaskData, tokenizer: Any) -> Head:
    """The configured head. Raises UserError if wording, task and tokenizer do not fit."""
    head: Head = registry.OBJECTIVES[config.model.head].build(config, task, tokenizer)
    return head
