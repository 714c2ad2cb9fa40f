"""SLoRA as one plain PyTorch loop in which the backbone's weights themselves train, under a mask,
and go back to the checkpoint's; numpy's SVD between the stages.

It shares with hpcfed what the comparison holds fixed (rows, batches, initial values, the places
that are drawn, who is sampled) and nothing of what it checks: modules, rules, exchange.
"""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import nn

from hpcfed.adapters.layout import AdapterLayout
from hpcfed.adapters.sparse import places
from hpcfed.data.batches import Ids, form_batches
from hpcfed.policies.sampling import sample
from hpcfed.rng import generator
from hpcfed.settings.config import Aggregation, Config
from tests.mpi.reference import begin
from tests.mpi.reference_factors import factors
from tests.mpi.slow import Plain, obvious_losses


@dataclass
class Outcome:
    """What a loop came to: values (size,) of LoRA and head, before and after; between: how far each
    weight had moved when the first stage ended."""

    layout: AdapterLayout
    initial: torch.Tensor
    values: torch.Tensor
    between: dict[str, torch.Tensor]


class Loop:
    """`run` gives what the method came to."""

    def __init__(self, config: Config, stage: int) -> None:
        """stage: rounds of the first one."""
        self.config, self.stage = config, stage
        adapter = replace(config.adapter, sparse=0.0)
        plain = replace(config, adapter=adapter, aggregation=Aggregation())
        self.rows, self.head, self.tokens, prepared = begin(plain)
        labels = tuple(map(str, range(prepared.adapted.network.inner.config.num_labels)))
        self.plain = Plain(plain, labels, self.head)
        self.layout, self.values = self.plain.layout, self.plain.initial
        self.weights = {
            name: self.plain.network.get_parameter(f"backbone.{name}.base_layer.weight")
            for name in factors(self.layout, self.values)
        }
        self.moved = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        self.checkpoint = {name: w.detach().clone() for name, w in self.weights.items()}
        self.trains = {}
        for name, w in self.weights.items():
            mask = torch.zeros(w.numel(), dtype=torch.bool)
            out, width = w.shape
            mask[places(f"{name}.lora_A.weight", out, width, config.adapter.sparse)] = True
            self.trains[name] = mask.view(w.shape)

    def batches(self, k: int, number: int) -> list[Ids]:
        """Of all local epochs."""
        found: list[Ids] = []
        for epoch in range(self.config.local.epochs):
            rng = generator(self.config.seed, "batches", number, k, epoch)
            size = self.config.local.batch_size
            found += form_batches(self.rows[k].train, self.tokens.lengths, size, rng)
        return found

    def first(self, k: int, number: int) -> torch.Tensor:
        """A client's round of the first stage: head, then the weights' moves, one after another."""
        network, span = self.plain.network, self.layout.span("head")
        heads = [p for n, p in network.named_parameters() if ".classifier." in n]
        owns = [network.get_parameter(f"backbone.{e.name}") for e in self.layout.entries
                if e.block == "head"]  # fmt: skip
        assert {id(p) for p in owns} == {id(p) for p in heads}
        with torch.no_grad():
            for entry, own in zip(self.layout.part(["head"]).entries, owns, strict=True):
                own.copy_(self.values[entry.values].view(entry.shape))
            for name, w in self.weights.items():
                w.copy_(self.checkpoint[name] + self.moved[name])
        parameters = [*(w.requires_grad_(True) for w in self.weights.values()), *owns]
        optimizer = torch.optim.SGD(parameters, lr=self.config.local.lr)
        for batch in self.batches(k, number):
            optimizer.zero_grad()
            obvious_losses(network, self.head, batch, self.tokens).mean().backward()
            for name, w in self.weights.items():
                assert w.grad is not None
                w.grad[~self.trains[name]] = 0
            nn.utils.clip_grad_norm_(parameters, self.config.local.clip)
            optimizer.step()
        head = torch.cat([own.detach().flatten() for own in owns])
        assert len(head) == span.stop - span.start
        moved = [(w.detach() - self.checkpoint[n]).flatten() for n, w in self.weights.items()]
        for w in self.weights.values():
            w.requires_grad_(False)
        return torch.cat([head, *moved])

    def run(self) -> Outcome:
        """All rounds."""
        config, between = self.config, {}
        sgd = partial(torch.optim.SGD, lr=config.local.lr)
        for number in range(config.federation.rounds):
            sampled = sample(config.seed, number, len(self.rows), config.federation.per_round)
            n = {k: len(self.rows[k].train) for k in sampled}
            found = []
            for k in sampled:
                if number < self.stage:
                    own = self.first(k, number)
                else:
                    own = self.plain.train(
                        self.values, torch.ones(self.layout.size, dtype=torch.bool),
                        self.batches(k, number), self.tokens, sgd, config.local.clip,
                    )  # fmt: skip
                found.append(n[k] * own.double())
            mean = (torch.stack(found).sum(0) / sum(n.values())).float()
            if number >= self.stage:
                self.values = mean
                continue
            span = self.layout.span("head")
            sizes = [w.numel() for w in self.weights.values()]
            head, *moved = torch.split(mean, [span.stop - span.start, *sizes])
            self.values = self.values.clone()
            self.values[span] = head
            for (name, w), own in zip(self.weights.items(), moved, strict=True):
                self.moved[name] = own.view(w.shape)
            if number == self.stage - 1:
                between = dict(self.moved)
                self.turn()
        return Outcome(self.layout, self.plain.initial, self.values, between)

    def turn(self) -> None:
        """What has moved becomes LoRA, and the weights go back."""
        scale, rank = self.config.adapter.alpha / self.config.adapter.rank, self.config.adapter.rank
        for name, (a, b) in factors(self.layout, self.values).items():
            u, s, v = np.linalg.svd(self.moved[name].double().numpy() / scale)
            for i in range(rank):
                sign = np.sign(u[np.abs(u[:, i]).argmax(), i])
                a[i] = torch.from_numpy(sign * np.sqrt(s[i]) * v[i])
                b[:, i] = torch.from_numpy(sign * np.sqrt(s[i]) * u[:, i])
            with torch.no_grad():
                self.weights[name].copy_(self.checkpoint[name])
