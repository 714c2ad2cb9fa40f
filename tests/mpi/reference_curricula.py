"""LoRA FedAvg under a curriculum as one plain loop: which batches, and how much of their texts."""

import math
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from hpcfed.data.batches import Ids, Tokens, flatten, form_batches
from hpcfed.rng import generator
from hpcfed.settings.config import Config
from tests.mpi.reference_sharing import Loop


class Curricula(Loop):
    """`run` gives what the preset came to. preset: voc, se, slw, shortformer; clients are trained
    by SGD."""

    def __init__(self, preset: str, config: Config) -> None:
        super().__init__("all", config)
        self.preset, self.whole = preset, self.tokens
        self.losses: dict[int, dict[int, float]] = {}  # client -> row -> its loss, last met
        self.trained: dict[
            tuple[int, int], list[int]
        ] = {}  # (round, client) -> batches, easy first
        self.scored = [0] * config.federation.rounds
        self.counted = [0] * config.federation.rounds  # tokens
        self.lengths = [self.length(number) for number in range(config.federation.rounds)]

    def length(self, number: int) -> int:
        """Tokens that a text may have in a round."""
        spec, longest = self.config.curriculum, self.config.task.max_length
        x = number / (spec.full_at * self.config.federation.rounds)
        first = max(4, round(longest * {"slw": 0.125, "shortformer": 0.25}.get(self.preset, 1)))
        if self.preset == "slw":
            return int(first + (longest - first) * min(x, 1))
        return first if x < 1 else longest

    def cut(self, longest: int) -> Tokens:
        """[CLS], as many tokens of the text as fit, [SEP]."""
        rows = [self.whole.row(i).tolist() for i in range(len(self.whole))]
        rows = [row if len(row) <= longest else [*row[: longest - 1], row[-1]] for row in rows]
        return replace(flatten(rows, self.whole.labels, self.whole.pad_id))

    def share(self, number: int) -> float:
        """Of the batches that are in use."""
        x = min(1.0, number / (self.config.curriculum.full_at * self.config.federation.rounds))
        if self.preset == "voc":
            return math.sqrt(0.01**2 + (1 - 0.01**2) * x)
        return 0.5 + 0.5 * x

    def hardness(self, k: int, number: int) -> dict[int, float]:
        """Of a client's rows, at the server's values."""
        rows = [int(row) for row in self.rows[k].train]
        if self.preset == "voc":
            words = Counter(int(word) for row in rows for word in self.whole.row(row))
            every = sum(words.values())
            return {
                row: float(np.mean([-math.log(words[int(w)] / every) for w in self.whole.row(row)]))
                for row in rows
            }
        if k not in self.losses:
            told = self.plain.losses(self.w.float(), self.rows[k].train, self.whole)
            self.losses[k] = dict(zip(rows, told.tolist(), strict=True))
            self.scored[number] += len(rows)
        return self.losses[k]

    def batches(self, k: int, number: int) -> list[Ids]:
        """Those in use, in each epoch in another order; or, of texts cut short, all."""
        if self.preset in ("slw", "shortformer"):
            return super().batches(k, number)
        rng = generator(self.config.seed, "batches", k)
        size = self.config.local.batch_size
        formed = form_batches(self.rows[k].train, self.whole.lengths, size, rng)
        hard = self.hardness(k, number)
        sums = [sum(hard[int(row)] for row in batch) for batch in formed]
        order = sorted(range(len(formed)), key=lambda i: sums[i])
        used = order[: max(1, math.ceil(self.share(number) * len(formed) - 1e-9))]
        self.trained[number, k] = used
        found: list[Ids] = []
        for epoch in range(self.config.local.epochs):
            rng = generator(self.config.seed, "batches", number, k, epoch)
            found += [formed[used[i]] for i in rng.permutation(len(used))]
        return found

    def client(self, k: int, number: int) -> torch.Tensor:
        """A client's values after a round, step by step: SGD remembers nothing between them."""
        local, values = self.config.local, self.w.float()
        batches, tokens = self.batches(k, number), self.cut(self.lengths[number])
        for batch in batches:
            told = self.plain.losses(values, batch, tokens).tolist()
            if self.preset == "se":
                self.losses[k] |= dict(zip(map(int, batch), told, strict=True))
            self.counted[number] += sum(len(tokens.row(int(row))) for row in batch)
            sgd = partial(torch.optim.SGD, lr=local.lr)
            values = self.plain.train(values, self.all, [batch], tokens, sgd, local.clip)
        return values.double()
