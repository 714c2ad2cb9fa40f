"""Adaptive optimization as one plain PyTorch loop: one client and one sample at a time, server and
control variates written out client by client, in dictionaries.

It shares with hpcfed what the comparison holds fixed (rows, batches, initial values, who is
sampled) and nothing of what it checks: engine, hooks, layer choice, states, exchange, server.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hpcfed import model
from hpcfed.adapters.layout import AdapterLayout
from hpcfed.data import partition, sources
from hpcfed.data.batches import form_batches
from hpcfed.objectives import heads
from hpcfed.policies.sampling import sample
from hpcfed.rng import generator
from hpcfed.settings.config import Config
from tests.mpi.slow import Plain


@dataclass
class Outcome:
    """What a loop came to. All values (size,) float64."""

    config: Config
    layout: AdapterLayout
    initial: torch.Tensor
    values: torch.Tensor  # shared ones; elsewhere what everybody starts from
    layers: list[str]  # shared
    shared_part: torch.Tensor  # (size,) bool
    scores: dict[str, float]  # of the layers, if they were chosen
    personal: dict[int, torch.Tensor]
    controls: dict[int, torch.Tensor]  # if clients have any
    c: torch.Tensor  # the server's


class Loop:
    """`run` gives what the method came to."""

    def __init__(self, config: Config, lost: tuple[tuple[int, int], ...] = ()) -> None:
        """lost: (round, client) whose update is not finite."""
        self.config, self.lost = config, lost
        task = sources.load(config)
        self.rows = partition.partition(task, config)
        tokenizer = model.load_tokenizer(config)
        head = heads.build(config, task, tokenizer)
        self.tokens = head.encode(task.train, tokenizer, config.task.max_length)
        self.plain = Plain(config, task.labels, head)
        self.layout = self.plain.layout
        self.initial = self.plain.initial.double()
        self.shared_part = torch.ones(self.layout.size, dtype=torch.bool)
        self.layers = list(self.layout.layers)
        self.scores: dict[str, float] = {}
        self.personal: dict[int, torch.Tensor] = {}
        self.zero = torch.zeros(self.layout.size, dtype=torch.float64)
        self.controls = dict.fromkeys(range(len(self.rows)), self.zero)
        self.c = self.v = self.zero
        self.r = self.zero + config.server.tau**2
        self.before: torch.Tensor | None = None
        self.rate = config.server.lr
        self.optimizers: dict[int, dict[str, Any]] = {}

    def run(self) -> Outcome:
        """All rounds."""
        w = self.rounds()
        keeps = self.config.local.control or self.config.server.control
        return Outcome(
            self.config, self.layout, self.initial, w, self.layers, self.shared_part, self.scores,
            self.personal, self.controls if keeps else {}, self.c,
        )  # fmt: skip

    def rounds(self) -> torch.Tensor:
        """All rounds; the shared values (size,), elsewhere what everybody starts from."""
        config, w = self.config, self.initial
        for number in range(config.federation.rounds):
            if number == config.curriculum.warmup and config.layers.score != "all":
                self.choose_layers()
            sampled = sample(config.seed, number, len(self.rows), config.federation.per_round)
            well = [k for k in sampled if (number, k) not in self.lost]
            back = {k: self.client(k, number, w) for k in well}
            mean = self.mean({k: own[0] for k, own in back.items()})
            after = self.server(w, mean, back) if number >= config.curriculum.warmup else mean
            w = torch.where(self.shared_part, after, w)
        return w

    def mean(self, values: dict[int, torch.Tensor]) -> torch.Tensor:
        rows = sum(len(self.rows[k].train) for k in values)
        parts = [len(self.rows[k].train) * own for k, own in values.items()]
        return torch.stack(parts).sum(0) / rows

    def choose_layers(self) -> None:
        """By the mean score at the initial values, of 8 rows of each client at most."""
        n = [len(own.train) for own in self.rows]
        scores = []
        for k, own in enumerate(self.rows):
            rows = generator(self.config.seed, "probe", k).permutation(own.train)[:8]
            scores.append(self.plain.alike(self.initial.float(), rows, self.tokens))
        z = np.average(scores, axis=0, weights=n)
        self.scores = dict(zip(self.layers, z.tolist(), strict=True))
        assert not isinstance(self.config.layers.keep, str)
        number = round(self.config.layers.keep * len(z))
        best = sorted(range(len(z)), key=lambda i: -z[i])[:number]
        self.layers = [self.layout.layers[i] for i in sorted(best)]
        for block in self.layout.layers:
            if block not in self.layers:
                self.shared_part[self.layout.span(block)] = False

    def client(self, k: int, number: int, w: torch.Tensor) -> tuple[torch.Tensor, int, Any]:
        """A client's values, its steps, and the mean of its clipped gradients."""
        config, local = self.config, self.config.local
        warm = number < config.curriculum.warmup
        start = torch.where(self.shared_part, w, self.personal.get(k, w)).float()
        added = self.zero
        if local.control and not warm:
            added = torch.where(self.shared_part, self.c - self.controls[k], self.zero)
        leaf = torch.nn.Parameter(start.clone())
        optimizer: Any
        if local.optimizer == "sgd":
            optimizer = torch.optim.SGD(
                [leaf], lr=local.lr, weight_decay=local.weight_decay, momentum=local.momentum
            )
        else:
            kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[local.optimizer]
            optimizer = kind([leaf], lr=local.lr, weight_decay=local.weight_decay)
        if local.moments == "keep" and k in self.optimizers:
            optimizer.load_state_dict(self.optimizers[k])
        gradients = []
        for epoch in range(local.epochs):
            rng = generator(config.seed, "batches", number, k, epoch)
            for batch in form_batches(
                self.rows[k].train, self.tokens.lengths, local.batch_size, rng
            ):
                optimizer.zero_grad()
                loss = self.plain.losses(leaf, batch, self.tokens).mean()
                loss.backward()
                if local.clip:
                    torch.nn.utils.clip_grad_norm_([leaf], local.clip)
                assert leaf.grad is not None
                gradients.append(leaf.grad.double().clone())
                leaf.grad += added.float() + local.proximal * (leaf.detach() - start)
                optimizer.step()
        self.optimizers[k] = optimizer.state_dict()
        values = leaf.detach().double()
        if not warm:
            self.personal[k] = values
        return values, len(gradients), torch.stack(gradients).mean(0)

    def server(
        self, w: torch.Tensor, mean: torch.Tensor, back: dict[int, tuple[torch.Tensor, int, Any]]
    ) -> torch.Tensor:
        """The next shared values, from each client's."""
        spec, everybody = self.config.server, len(self.rows)
        n = {k: len(self.rows[k].train) for k in range(everybody)}
        rows, steps = sum(n[k] for k in back), sum(s for _, s, _ in back.values())
        delta = w - mean
        term = self.zero
        if self.config.local.control:
            new = {k: gradient for k, (_, _, gradient) in back.items()}
            self.c = self.c + sum(new[k] - self.controls[k] for k in back) / everybody
            self.controls |= new
        elif spec.control and spec.gradient == "difference":
            lr = self.config.local.lr
            new = {
                k: self.controls[k] - self.c + (w - own) / (s * lr)
                for k, (own, s, _) in back.items()
            }
            moved = sum(s / steps * (new[k] - self.controls[k]) for k, (_, s, _) in back.items())
            self.c = self.c + len(back) / everybody * moved
            self.controls |= new
            term = sum(n[k] / rows * (self.c - new[k]) for k in back)
        elif spec.control:
            whole = sum(n[k] * self.controls[k] for k in n) / sum(n.values())
            sampled = sum(n[k] * self.controls[k] for k in back) / rows
            term = torch.as_tensor(whole - sampled)
            self.controls |= {k: w - own for k, (own, _, _) in back.items()}
            self.c = torch.as_tensor(sum(n[k] * self.controls[k] for k in n) / sum(n.values()))
        if spec.optimizer == "mean":
            return mean
        rate, self.rate = self.rate, max(self.rate * spec.lr_decay, 1e-4)
        if spec.optimizer in ("adam", "yogi"):
            self.v = spec.momentum * self.v + (1 - spec.momentum) * delta
            self.r = spec.beta2 * self.r + (1 - spec.beta2) * delta**2
            return w - rate * self.v / (self.r.sqrt() + spec.tau)
        if spec.gradient == "pseudo_gradient":
            self.v = spec.momentum * self.v + delta + term
            return w - rate * self.v
        before, self.before = self.before, delta
        if before is None:
            self.rate = rate
            return mean
        self.v = spec.momentum * self.v + (1 - spec.momentum) * (before - delta) + term
        return mean - rate * self.v
