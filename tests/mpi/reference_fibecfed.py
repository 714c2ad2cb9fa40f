"""FibecFed as one plain PyTorch loop, one client and one sample at a time.

It shares with hpcfed what the comparison holds fixed (rows, batches as they are formed, initial
values, who is sampled, the draws of shuffles) and nothing of what it checks: engine, hooks, order,
pace, layer choice, masks, states, mean.
"""

import math
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch

from hpcfed import model
from hpcfed.data import partition, sources
from hpcfed.data.batches import Ids, form_batches, tokenize
from hpcfed.policies.sampling import sample
from hpcfed.rng import generator
from hpcfed.settings.config import Config
from tests.mpi.slow import Plain


@dataclass
class Decisions:
    """What the method decided, and the values it came to."""

    layers: list[str] = field(default_factory=list)
    trained: dict[tuple[int, int], list[int]] = field(default_factory=dict)  # (round, client)
    difficulty: dict[tuple[int, int], dict[int, float]] = field(default_factory=dict)
    masks: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    samples: dict[int, int] = field(default_factory=lambda: defaultdict(int))  # by round
    scored: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    initial: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    shared: torch.Tensor = field(default_factory=lambda: torch.zeros(0))  # (size,)
    personal: dict[int, torch.Tensor] = field(default_factory=dict)  # client -> (size,)


class Reference:
    """The loop; `run` returns what it decided."""

    def __init__(self, config: Config) -> None:
        self.config = config
        task = sources.load(config)
        self.rows = partition.partition(task, config)
        tokenizer = model.load_tokenizer(config)
        self.tokens = tokenize(task.train, tokenizer, config.task.max_length)
        self.plain = Plain(config, task.labels)
        self.layout = self.plain.layout
        self.found = Decisions()
        self.found.initial = model.prepare(config, task.labels, 0, {}).initial
        self.global_part = torch.ones(self.layout.size, dtype=torch.bool)
        self.known: dict[int, dict[int, float]] = {}  # client -> row -> difficulty
        self.fisher: dict[int, torch.Tensor] = {}  # client -> (size,) momentum of squares

    def run(self) -> Decisions:
        """All rounds."""
        config, found = self.config, self.found
        shared = found.initial.clone()
        for number in range(config.federation.rounds):
            if number == config.curriculum.warmup:
                self.choose_layers(found.initial)
                if config.curriculum.when == "start":
                    for k in range(len(self.rows)):
                        self.score(k, number, shared)
            total, weight = torch.zeros(self.layout.size, dtype=torch.float64), 0
            for k in sample(config.seed, number, len(self.rows), config.federation.per_round):
                values = self.client(k, number, shared)
                total += len(self.rows[k].train) * values.double()
                weight += len(self.rows[k].train)
                if number >= config.curriculum.warmup:
                    found.personal[k] = values
            mean = (total / weight).float()
            every, after = config.layers.sync_every, number + 1 - config.curriculum.warmup
            synced = every is not None and after > 0 and after % every == 0
            shared = mean if synced else torch.where(self.global_part, mean, shared)
        found.shared = shared
        return found

    def choose_layers(self, vector: torch.Tensor) -> None:
        """The layers with the highest mean sensitivity over clients, weighted by their rows."""
        config = self.config
        clients = range(len(self.rows))
        scores = np.zeros(len(self.layout.layers))
        for k in clients:
            rng = generator(config.seed, "probe", k)
            batch = rng.permutation(self.rows[k].train)[: config.local.batch_size]
            own = [self.plain.sensitivity(vector, int(row), self.tokens) for row in batch]
            self.found.scored[config.curriculum.warmup] += 2 * len(batch)
            scores += len(self.rows[k].train) * np.mean(own, axis=0)
        assert not isinstance(config.layers.keep, str)
        number = math.floor(config.layers.keep * len(scores) + 0.5)
        best = sorted(range(len(scores)), key=lambda i: -scores[i])[:number]
        self.found.layers = [self.layout.layers[i] for i in sorted(best)]
        for block in self.layout.layers:
            if block not in self.found.layers:
                self.global_part[self.layout.span(block)] = False

    def score(self, k: int, number: int, vector: torch.Tensor) -> None:
        """A client's difficulties, by a pass of its own."""
        rows = self.rows[k].train
        self.known[k] = {int(row): float(self.squares(vector, int(row)).sum()) for row in rows}
        self.found.scored[number] += len(rows)

    def squares(self, vector: torch.Tensor, row: int) -> torch.Tensor:
        """(size,) squared gradient of one sample."""
        return self.plain.gradient(vector, row, self.tokens).square()

    def client(self, k: int, number: int, shared: torch.Tensor) -> torch.Tensor:
        """One client's round; its values afterwards."""
        config, found = self.config, self.found
        warm = number < config.curriculum.warmup
        start = shared.clone()
        if k in found.personal:
            start = torch.where(self.global_part, shared, found.personal[k])
        rng = generator(config.seed, "batches", k)
        rows = self.rows[k].train
        batches = form_batches(rows, self.tokens.lengths, config.local.batch_size, rng)
        mask = torch.ones(self.layout.size, dtype=torch.bool) if warm else self.mask(k)
        found.masks[number, k] = mask
        spec = config.curriculum
        x = number / (spec.full_at * config.federation.rounds)
        count = math.ceil(min(1.0, spec.start + (1 - spec.start) * x) * len(batches) - 1e-9)
        values, total, samples = start, torch.zeros(self.layout.size), 0
        if warm:
            drawn = generator(config.seed, "warmup", number, k).permutation(len(batches))
            order = [int(i) for i in drawn]
        else:
            if k not in self.known and spec.when == "training":
                self.known[k] = {int(r): math.inf for r in rows}
                drawn = generator(config.seed, "order", k).permutation(len(batches))
                order = [int(i) for i in drawn]
            else:
                if k not in self.known:
                    self.score(k, number, start)
                sums = [sum(self.known[k][int(r)] for r in batch) for batch in batches]
                order = sorted(range(len(batches)), key=lambda i: sums[i])
        used = found.trained[number, k] = order[:count]
        for epoch in range(config.local.epochs):
            shuffle = generator(config.seed, "batches", number, k, epoch).permutation(len(used))
            part = [batches[used[i]] for i in shuffle]
            values, squares, met = self.train(values, mask, part, k, number)
            total, samples = total + squares, samples + met
        found.samples[number] += samples
        if not warm:
            found.difficulty[number, k] = dict(self.known[k])
            old = self.fisher.get(k, torch.zeros(self.layout.size))
            gamma = config.sparsity.momentum
            self.fisher[k] = gamma * old + (1 - gamma) * total / samples
        return values

    def train(
        self, start: torch.Tensor, mask: torch.Tensor, batches: list[Ids], k: int, number: int
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """SGD on the values that are not masked; before each step the squared gradients of single
        samples. Returns the values, the sum of squares (size,), and over how many samples."""
        config = self.config
        free = torch.nn.Parameter(start[mask].clone())
        optimizer = torch.optim.SGD([free], lr=config.local.lr)
        total, samples = torch.zeros(self.layout.size), 0
        for batch in batches:
            whole = start.clone()
            whole[mask] = free
            for row in batch:
                own = self.squares(whole.detach(), int(row))
                total += own
                if number >= config.curriculum.warmup and config.curriculum.refresh:
                    self.known[k][int(row)] = float(own.sum())
            samples += len(batch)
            optimizer.zero_grad()
            loss = self.plain.losses(whole, batch, self.tokens).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([free], config.local.clip)
            optimizer.step()
        values = start.clone()
        values[mask] = free.detach()
        return values, total, samples

    def mask(self, k: int) -> torch.Tensor:
        """(size,) True trains: in each matrix of the layers that stay home, the best neurons."""
        mask = torch.ones(self.layout.size, dtype=torch.bool)
        if k not in self.fisher:
            return mask
        for entry in self.layout.entries:
            if self.global_part[entry.offset]:
                continue
            scores = self.fisher[k][entry.values].reshape(entry.shape)
            axis = 1 if "lora_A" in entry.name else 0
            neurons = scores.movedim(axis, 0).flatten(1).sum(1)
            number = math.floor(self.config.sparsity.keep * len(neurons) + 0.5)
            best = sorted(range(len(neurons)), key=lambda i: -float(neurons[i]))[:number]
            own = torch.zeros(entry.shape, dtype=torch.bool)
            if axis == 0:
                own[best] = True
            else:
                own[:, best] = True
            mask[entry.values] = own.flatten()
        return mask
