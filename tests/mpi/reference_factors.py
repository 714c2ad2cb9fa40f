"""What the server makes of clients' LoRA factors, as one plain PyTorch loop in which the backbone's
weights are whole, and move: dense products, dense means, a dense SVD.

It shares with hpcfed what the comparison holds fixed (rows, batches, initial values, draws, who is
sampled) and nothing of what it checks: residuals, gains, rules, exchange.
"""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from hpcfed import model
from hpcfed.adapters.layout import AdapterLayout
from hpcfed.data import partition, sources
from hpcfed.data.batches import Ids, form_batches
from hpcfed.objectives import heads
from hpcfed.policies.sampling import sample
from hpcfed.rng import generator
from hpcfed.settings.config import Aggregation, Config
from tests.mpi.slow import Plain


@dataclass
class Outcome:
    """What a loop came to, float64. values (size,), of a layout without residual; moved: matrix ->
    how far its weight has moved from the checkpoint's, LoRA apart; ranks: of each client."""

    config: Config
    layout: AdapterLayout
    initial: torch.Tensor
    values: torch.Tensor
    moved: dict[str, torch.Tensor]
    ranks: dict[int, int]

    def change(self, values: torch.Tensor, name: str) -> torch.Tensor:
        """All that is added to a weight: s B A and what the weight itself has moved."""
        a, b = factors(self.layout, values)[name]
        scale = self.config.adapter.alpha / self.config.adapter.rank
        return scale * b @ a + self.moved[name]


def factors(
    layout: AdapterLayout, values: torch.Tensor
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Matrix -> A and B: views."""
    found = {e.name: values[e.values].view(e.shape) for e in layout.entries}
    return {
        name.partition(".lora_A")[0]: (value, found[name.replace("lora_A", "lora_B")])
        for name, value in found.items()
        if "lora_A" in name
    }


class Loop:
    """`run` gives what the method came to. method: a rule's name."""

    def __init__(self, config: Config, lost: tuple[tuple[int, int], ...] = ()) -> None:
        """lost: (round, client) whose update is not finite."""
        self.method, self.config, self.lost = config.aggregation.rule, config, lost
        task = sources.load(config)
        self.rows = partition.partition(task, config)
        tokenizer = model.load_tokenizer(config)
        head = heads.build(config, task, tokenizer)
        self.tokens = head.encode(task.train, tokenizer, config.task.max_length)
        adapter = replace(config.adapter, residual=0, delta=0.0)
        plain = replace(config, adapter=adapter, aggregation=Aggregation())
        self.plain = Plain(plain, task.labels, head)
        self.layout = self.plain.layout
        self.w = self.initial = self.plain.initial.double()
        self.scale = config.adapter.alpha / config.adapter.rank
        self.weights = {
            name: self.plain.network.get_parameter(f"backbone.{name}.base_layer.weight")
            for name in factors(self.layout, self.w)
        }
        self.checkpoint = {k: w.detach().double().clone() for k, w in self.weights.items()}
        self.moved = {k: torch.zeros_like(w) for k, w in self.checkpoint.items()}
        least, most = config.updates.least_rank, config.adapter.rank
        self.ranks = {
            k: int(generator(config.seed, "rank", k).integers(least, most + 1))
            if config.updates.transforms
            else most
            for k in range(len(self.rows))
        }

    def run(self) -> Outcome:
        """All rounds."""
        federation = self.config.federation
        for number in range(federation.rounds):
            sampled = sample(self.config.seed, number, len(self.rows), federation.per_round)
            well = [k for k in sampled if (number, k) not in self.lost]
            n = {k: len(self.rows[k].train) for k in well}
            p = {k: n[k] / sum(n.values()) for k in well}
            trained = {k: self.client(k, number) for k in well}
            mean = sum(p[k] * trained[k][0] for k in well)
            assert isinstance(mean, torch.Tensor)
            own = {k: factors(self.layout, trained[k][0]) for k in well}
            for name, (a, b) in factors(self.layout, mean).items():
                products = sum(p[k] * own[k][name][1] @ own[k][name][0] for k in well)
                assert isinstance(products, torch.Tensor)
                if self.method == "fedex":
                    self.moved[name] = self.moved[name] + self.scale * (products - b @ a)
                elif self.method == "flora":
                    self.moved[name] = self.moved[name] + self.scale * products
                    rng = generator(self.config.seed, "flora", number, f"{name}.lora_A.weight")
                    drawn = rng.uniform(-1 / np.sqrt(a.shape[1]), 1 / np.sqrt(a.shape[1]), a.shape)
                    a[...] = torch.from_numpy(drawn.astype(np.float32))
                    b[...] = 0
                elif self.method == "flexlora":
                    self.best(a, b, products.numpy())
                elif self.method == "fair":
                    gram = a @ a.T
                    ridge = self.config.aggregation.ridge * a.square().sum(1).mean()
                    inverse = torch.linalg.inv(gram + ridge * torch.eye(len(gram)).double())
                    b += (products - b @ a) @ a.T @ inverse
                else:
                    mine = torch.stack([p[k] * trained[k][1][name] for k in well])
                    self.moved[name] = mine.sum(0)
            self.w = mean
        return Outcome(self.config, self.layout, self.initial, self.w, self.moved, self.ranks)

    def best(self, a: torch.Tensor, b: torch.Tensor, product: np.ndarray) -> None:
        """Write the best factors of a product into A and B; where it has none, keep A."""
        u, s, v = np.linalg.svd(product, full_matrices=False)
        b[...] = 0
        for rank in range(min(len(a), int((s > 1e-7 * s[0]).sum()))):
            sign = np.sign(u[np.abs(u[:, rank]).argmax(), rank])
            b[:, rank] = torch.from_numpy(sign * np.sqrt(s[rank]) * u[:, rank])
            a[rank] = torch.from_numpy(sign * np.sqrt(s[rank]) * v[rank])

    def batches(self, k: int, number: int) -> list[Ids]:
        """Of all local epochs."""
        found: list[Ids] = []
        for epoch in range(self.config.local.epochs):
            rng = generator(self.config.seed, "batches", number, k, epoch)
            found += form_batches(
                self.rows[k].train, self.tokens.lengths, self.config.local.batch_size, rng
            )
        return found

    def client(self, k: int, number: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """A client's values after a round, and how far its backbone's weights have moved: with
        Delta-LoRA after each of its steps."""
        has = torch.ones(self.layout.size)
        for a, b in factors(self.layout, has).values():
            a[self.ranks[k] :], b[:, self.ranks[k] :] = 0, 0
        values, moved = torch.where(has > 0, self.w, 0.0).float(), dict(self.moved)
        local = self.config.local
        sgd = partial(torch.optim.SGD, lr=local.lr)
        for batch in self.batches(k, number):
            with torch.no_grad():
                for name, weight in self.weights.items():
                    weight.copy_(self.checkpoint[name] + moved[name])
            before = {n: b @ a for n, (a, b) in factors(self.layout, values.double()).items()}
            values = self.plain.train(values, has > 0, [batch], self.tokens, sgd, local.clip)
            for name, (a, b) in factors(self.layout, values.double()).items():
                step = self.config.adapter.delta * self.scale * (b @ a - before[name])
                moved[name] = moved[name] + step
        return values.double(), moved
