"""AdaLoRA in a federation: which singular values are left (Zhang et al. 2023).

A client's steps measure how much each value w matters, by I = |w g|, smoothed, and its uncertainty
(eqs. 9 and 10 there; `hpcfed.engine.masters`), and it sends a score for each singular value,

    S_i = s(Lambda_i) + mean over j of s(P_ji) + mean over j of s(Q_ij),    s = I U.

That clients measure anew in each round, that the server averages their scores with the values, and
that it prunes, after each round instead of within it, are ours: so all clients agree, and nothing
is remembered but Lambda itself. What is pruned is zero, and may come back, until the budget is
what it ends at; from then on what is zero is neither trained nor sent, nor are its vectors.

The budget is eq. 12's: all singular values, then fewer by a cubic curve, then `aggregation.budget`
for each matrix on average.
"""

import math
from collections.abc import Iterator, Sequence

import torch

from hpcfed.adapters.layout import AdapterLayout, Entry
from hpcfed.round import Round
from hpcfed.server.factors import Rule, Sent
from hpcfed.settings.config import Config


class Budget(Rule):
    """Singular values beyond the budget are zero."""

    gathers = False
    settles = True
    senses = True

    def __init__(self, config: Config, layout: AdapterLayout) -> None:
        super().__init__(config, layout)
        self.part = layout.roles("Lambda")
        by_name = {entry.name: entry for entry in layout.entries}
        self._triples: list[tuple[Entry, Entry, Entry]] = [
            (own, by_name[_beside(own, "lora_B")], by_name[_beside(own, "lora_A")])
            for own in self.part.entries
        ]
        self.extra = self.part.size
        spec, rounds = config.aggregation, config.federation.rounds
        self._first, self._last = spec.prune_from * rounds, spec.prune_to * rounds

    def budget(self, done: int) -> int:
        """How many singular values of all are left after so many rounds."""
        least = min(self.extra, round(self._config.aggregation.budget * len(self._triples)))
        if done >= self._last:
            return least
        left = min(1.0, (self._last - done) / (self._last - self._first))
        return least + round((self.extra - least) * left**3)

    def report(self, importance: torch.Tensor) -> torch.Tensor:
        """(extra,) the scores; importance (layout.size,): s of each value."""
        scores = []
        for singular, left, right in self._triples:
            p, q = (importance[own.values].view(own.shape) for own in (left, right))
            scores.append(importance[singular.values] + p.mean(0) + q.mean(1))
        return torch.cat(scores)

    def next(
        self, values: torch.Tensor, sent: Sequence[Sent], now: Round, told: torch.Tensor
    ) -> tuple[torch.Tensor, float]:
        """The values with those singular values zero whose scores `told` are not among the
        highest; ties to the lower index."""
        budget = self.budget(now.number + 1)
        best = torch.sort(told, descending=True, stable=True).indices[:budget]
        keeps = torch.zeros(self.extra, dtype=torch.bool)
        keeps[best] = True
        values = values.clone()
        self.part.unpack(torch.where(keeps, self.part.pack(values), 0.0), values)
        return values, 0.0

    def rests(self, values: torch.Tensor, number: int) -> torch.Tensor | None:
        """Once the budget is what it ends at: the singular values that are zero, their vectors."""
        if number < self._last or number == 0:
            return None
        mask = torch.zeros(self.layout.size, dtype=torch.bool)
        for singular, left, right in self._triples:
            gone = values[singular.values] == 0
            mask[singular.values] = gone
            mask[left.values] = gone.expand(left.shape).flatten()
            mask[right.values] = gone[:, None].expand(right.shape).flatten()
        return mask

    def plan(self) -> Iterator[str]:
        """What goes, and what that saves."""
        last, all_of = math.ceil(self._last), self.extra
        widths = [own[1].size + own[2].size for own in self._triples]
        each = round(sum(widths) / self.extra) + 1
        left = self.budget(last)
        yield (
            f"  and {all_of} scores; of {all_of} singular values {left} are left after round "
            f"{last} (aggregation.rule=budget), and {all_of - left} that rest, with their vectors, "
            f"save about {(all_of - left) * each * 4 / 1e6:.2f} MB a client from then on"
        )

    def note(self, values: torch.Tensor, lost: float) -> dict[str, float]:
        """How many are left."""
        return {"singular_values": int((self.part.pack(values) != 0).sum())}


def _beside(singular: Entry, name: str) -> str:
    return singular.name.replace("lora_E", name)
