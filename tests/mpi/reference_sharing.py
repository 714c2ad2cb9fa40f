"""What travels, what stays, and who has which rank, as one plain PyTorch loop: one client and one
sample at a time; parameters are told apart by their names.

It shares with hpcfed what the comparison holds fixed (rows, batches, initial values, who is
sampled) and nothing of what it checks: parts, rules, phases, masks, transforms, exchange.
"""

import re
from dataclasses import dataclass
from functools import partial

import torch

from hpcfed import model
from hpcfed.adapters.layout import AdapterLayout
from hpcfed.data import partition, sources
from hpcfed.data.batches import Ids, form_batches
from hpcfed.objectives import heads
from hpcfed.policies.sampling import sample
from hpcfed.rng import generator
from hpcfed.settings.config import Config
from tests.mpi.slow import Plain

UNIT = 1 / 65536  # of a norm, for one of weight


@dataclass
class Outcome:
    """What a loop came to. All values (size,) float64, all masks (size,) bool."""

    config: Config
    layout: AdapterLayout
    initial: torch.Tensor
    values: torch.Tensor  # the server's
    home: torch.Tensor  # what clients keep
    personal: dict[int, torch.Tensor]
    ranks: list[dict[int, int]]  # hetlora: each client's, before the first round and after each


class Loop:
    """`run` gives what the method came to. method: ffa, fedsa, rolora, fedalt, nothing, hetlora."""

    def __init__(self, method: str, config: Config, lost: tuple[tuple[int, int], ...] = ()) -> None:
        """lost: (round, client) whose update is not finite."""
        self.method, self.config, self.lost = method, config, lost
        task = sources.load(config)
        self.rows = partition.partition(task, config)
        tokenizer = model.load_tokenizer(config)
        head = heads.build(config, task, tokenizer)
        self.tokens = head.encode(task.train, tokenizer, config.task.max_length)
        self.plain = Plain(config, task.labels, head)
        self.layout = self.plain.layout
        self.w = self.initial = self.plain.initial.double()
        self.all = torch.ones(self.layout.size, dtype=torch.bool)
        self.a, self.b = self.named(r"lora_A"), self.named(r"lora_B")
        self.home = self.stays_home()
        self.personal: dict[int, torch.Tensor] = {}
        least, most = config.updates.least_rank, config.adapter.rank
        self.ranks = {
            k: int(generator(config.seed, "rank", k).integers(least, most + 1))
            for k in range(len(self.rows))
        }

    def named(self, pattern: str) -> torch.Tensor:
        """(size,) bool: the parameters whose name matches."""
        found = torch.zeros(self.layout.size, dtype=torch.bool)
        for entry in self.layout.entries:
            found[entry.values] = re.search(pattern, entry.name) is not None
        return found

    def stays_home(self) -> torch.Tensor:
        """What each client keeps to itself after the warm-up."""
        if self.method == "fedsa":
            return self.b
        if self.method == "fedalt":  # the last half of the layers is shared, rounded up
            layers = self.config.layers
            assert (layers.score, layers.keep) == ("last", 0.5)
            count = len(self.layout.layers)
            personal = range(count - (count + 1) // 2)
            return self.named(rf"\.layer\.({'|'.join(map(str, personal))})\.")
        return self.all if self.method == "nothing" else ~self.all

    def stands_still(self, number: int) -> torch.Tensor:
        """What nobody trains in a round."""
        if self.method == "ffa":
            return self.a
        if self.method == "rolora":
            return self.a if number % 2 == 0 else self.b
        return ~self.all

    def run(self) -> Outcome:
        """All rounds."""
        federation, ranks = self.config.federation, [dict(self.ranks)]
        for number in range(federation.rounds):
            sampled = sample(self.config.seed, number, len(self.rows), federation.per_round)
            well = [k for k in sampled if (number, k) not in self.lost]
            if number < self.config.curriculum.warmup:
                self.average({k: self.train(self.w, self.all, k, number) for k in well}, ~self.all)
            elif self.method == "hetlora":
                self.average_ranks({k: self.train_ranks(k, number) for k in well})
            else:
                self.personal |= {k: self.client(k, number) for k in well}
                still = self.stands_still(number)
                self.average({k: self.personal[k] for k in well}, self.home | still)
            ranks.append(dict(self.ranks))
        keeps = self.personal if self.home.any() else {}
        return Outcome(self.config, self.layout, self.initial, self.w, self.home, keeps, ranks)

    def average(self, values: dict[int, torch.Tensor], without: torch.Tensor) -> None:
        """The server's next values: the clients' mean, by rows, but for what does not travel."""
        n = {k: len(self.rows[k].train) for k in values}
        mean = torch.stack([n[k] * own for k, own in values.items()]).sum(0) / sum(n.values())
        self.w = torch.where(without, self.w, mean)

    def batches(self, k: int, number: int) -> list[Ids]:
        """Of all local epochs."""
        found: list[Ids] = []
        for epoch in range(self.config.local.epochs):
            rng = generator(self.config.seed, "batches", number, k, epoch)
            found += form_batches(
                self.rows[k].train, self.tokens.lengths, self.config.local.batch_size, rng
            )
        return found

    def train(
        self, start: torch.Tensor, trains: torch.Tensor, k: int, number: int,
        begin: float = 0, end: float = 1,
    ) -> torch.Tensor:  # fmt: skip
        """The values after a client's steps. begin, end: which part of the round's batches."""
        local, batches = self.config.local, self.batches(k, number)
        part = batches[int(begin * len(batches)) : int(end * len(batches))]
        sgd = partial(torch.optim.SGD, lr=local.lr)
        after = self.plain.train(start.float(), trains, part, self.tokens, sgd, local.clip)
        return after.double()

    def client(self, k: int, number: int) -> torch.Tensor:
        """A client's values after a round: it starts from the server's, but for its own."""
        start = torch.where(self.home, self.personal.get(k, self.w), self.w)
        if self.method == "fedalt":
            between = self.train(start, self.home, k, number, end=0.5)
            return self.train(between, ~self.home, k, number, begin=0.5)
        return self.train(start, ~self.stands_still(number), k, number)

    # HetLoRA.

    def matrices(self, values: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """A (r, d_in) and B (d_out, r) of each adapted matrix: views."""
        by_name = {e.name: values[e.values].view(e.shape) for e in self.layout.entries}
        pairs = [(name, name.replace("lora_A", "lora_B")) for name in by_name if "lora_A" in name]
        return [(by_name[a], by_name[b]) for a, b in pairs]

    def has(self, rank: int) -> torch.Tensor:
        """(size,) bool: what a client of this rank has."""
        own = torch.ones(self.layout.size)
        for a, b in self.matrices(own):
            a[rank:, :] = 0
            b[:, rank:] = 0
        return own > 0

    def train_ranks(self, k: int, number: int) -> torch.Tensor:
        """A client's values after a round, in a model that ends with its last rank."""
        has = self.has(self.ranks[k])
        return self.train(torch.where(has, self.w, 0.0), has, k, number)

    def average_ranks(self, values: dict[int, torch.Tensor]) -> None:
        """Each client's last rank shrinks; it is given up, from the next round on, if it is less
        than when it was handed out. Then each value's mean, over the clients that have it, by the
        norms of their B A."""
        sums, weights = torch.zeros_like(self.w), torch.zeros_like(self.w)
        for k, own in values.items():
            rank = self.ranks[k]
            has = self.has(rank)
            if self.config.updates.rank_decay and rank > 1:
                last = has & ~self.has(rank - 1)
                own = torch.where(last, (1 - self.config.updates.rank_decay) * own, own)
                if self.strength(own, rank - 1) < self.strength(self.w, rank - 1):
                    self.ranks[k] = rank - 1
            norm = sum(float(torch.linalg.norm(b @ a)) for a, b in self.matrices(own))
            sums += round(norm / UNIT) * torch.where(has, own, 0.0)
            weights += round(norm / UNIT) * has
        self.w = torch.where(weights > 0, sums / weights.clamp(min=1), self.w)

    def strength(self, values: torch.Tensor, rank: int) -> float:
        """||b|| ||a|| of one rank, over all matrices."""
        return sum(float(b[:, rank].norm() * a[rank].norm()) for a, b in self.matrices(values))
