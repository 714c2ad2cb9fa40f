"""HetLoRA (Cho et al. 2024): clients that can hold different ranks.

Client k has the first r_k of r ranks: rows of A, columns of B; the others are zero to it. Each
value's mean is over the clients that have it, with weights in proportion to ||B_k A_k||_F, summed
over the adapted matrices. Averaging only over those that have a value, and the form of the pruning,
are ours: with `updates.rank_decay` a client's last rank shrinks by that factor after each round,
and if ||b|| ||a|| of it is then less than when it was handed out, the client gives it up.
"""

import math

import torch

from hpcfed.adapters.layout import AdapterLayout
from hpcfed.policies.updates import Memo, Transform, Update
from hpcfed.rng import generator
from hpcfed.round import Round
from hpcfed.settings.config import Config

# Norms become whole weights in these units.
UNIT = 2**-16
LARGEST = 2**28


class Ranks(Transform):
    """Masks by client; each weighs its rows."""

    masks = True

    def __init__(self, config: Config, layout: AdapterLayout) -> None:
        self._seed, self._layout = config.seed, layout
        self._least, self._most = config.updates.least_rank, config.adapter.rank

    def rank(self, client: int, memo: Memo) -> int:
        """The client's rank now: drawn once, uniformly from least_rank to adapter.rank."""
        if "rank" in memo:
            return int(memo["rank"])
        drawn = generator(self._seed, "rank", client).integers(self._least, self._most + 1)
        return int(drawn)

    def has(self, client: int, memo: Memo) -> torch.Tensor | None:
        return self._first(self.rank(client, memo))

    def _first(self, rank: int) -> torch.Tensor:
        mask = torch.ones(self._layout.size, dtype=torch.bool)
        for entry in self._layout.entries:
            if entry.role in ("A", "B"):
                own = mask[entry.values].view(entry.shape)
                (own[rank:] if entry.role == "A" else own[:, rank:])[...] = False
        return mask

    def on_client(self, update: Update, now: Round) -> None:
        has = now.shared.pack(self._first(self.rank(update.client, update.memo)))
        update.mask = has if update.mask is None else update.mask & has


class HetLora(Ranks):
    """Weights by norm besides, and ranks that are given up."""

    def __init__(self, config: Config, layout: AdapterLayout) -> None:
        super().__init__(config, layout)
        self._decay = config.updates.rank_decay
        self.remembers = self._decay > 0

    def on_client(self, update: Update, now: Round) -> None:
        super().on_client(update, now)
        update.memo, rank = dict(update.memo), self.rank(update.client, update.memo)
        if self._decay and rank > 1:
            self._shrink(update, now, rank)
        norm = sum(_norm(a, b) for a, b in self._pairs(update.values, now))
        if math.isfinite(norm):  # else the update is refused, whatever it weighs
            update.weight = min(LARGEST, max(1, round(norm / UNIT)))

    def _shrink(self, update: Update, now: Round, rank: int) -> None:
        last = now.shared.pack(self._first(rank) & ~self._first(rank - 1))
        update.values = torch.where(last, (1 - self._decay) * update.values, update.values)
        before, after = (
            sum(
                float(b[:, rank - 1].norm() * a[rank - 1].norm())
                for a, b in self._pairs(values, now)
            )
            for values in (update.before, update.values)
        )
        update.memo["rank"] = torch.tensor(rank - 1 if after < before else rank)

    def _pairs(self, packed: torch.Tensor, now: Round) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(A (r, d_in), B (d_out, r)) in float64 of each adapted matrix of the shared part."""
        vector = torch.zeros(self._layout.size, dtype=torch.float64)
        now.shared.unpack(packed.double(), vector)
        found: dict[str, dict[str, torch.Tensor]] = {}
        for entry in now.shared.entries:
            if entry.role in ("A", "B"):
                matrix = entry.name.replace(f"lora_{entry.role}", "lora")
                value = vector[entry.values].view(entry.shape)
                found.setdefault(matrix, {})[entry.role] = value
        return [(pair["A"], pair["B"]) for pair in found.values() if len(pair) == 2]


def _norm(a: torch.Tensor, b: torch.Tensor) -> float:
    """||B A||_F = sqrt(tr((B'B)(AA'))): the product itself would be as large as the backbone's."""
    trace = ((b.T @ b) * (a @ a.T)).sum()
    return float(trace.clamp_min(0.0).sqrt())  # rounding may leave a zero below zero
