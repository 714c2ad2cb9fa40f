"""SLoRA (Babakniya et al. 2023): first some values of the backbone train, then LoRA, which starts
as the best of its rank to what they have become, by SVD: B = U sqrt(S / s), A = sqrt(S / s) V', s
LoRA's factor; and the backbone is again what it was."""

import math
from collections.abc import Iterator, Sequence

import torch

from hpcfed.adapters.factors import matrices
from hpcfed.adapters.layout import SPARSE, AdapterLayout
from hpcfed.adapters.sparse import places
from hpcfed.round import Round
from hpcfed.server.factors import NOTHING, Rule, Sent
from hpcfed.settings.config import Config
from hpcfed.settings.counts import first_stage


class Stages(Rule):
    """In the first stage LoRA rests, in the second the sparse values."""

    gathers = False

    def __init__(self, config: Config, layout: AdapterLayout) -> None:
        super().__init__(config, layout)
        self.part = layout.roles("A", "B", SPARSE)
        self._stage = first_stage(config)

    def settles(self, number: int) -> bool:
        """Once, between the stages."""
        return number == self._stage - 1

    def rests(self, values: torch.Tensor, number: int) -> torch.Tensor | None:
        first = number < self._stage
        return self.layout.roles(*(("A", "B") if first else (SPARSE,))).mask()

    def next(
        self, values: torch.Tensor, sent: Sequence[Sent], now: Round, told: torch.Tensor
    ) -> tuple[torch.Tensor, float]:
        """LoRA of the sparse values, one matrix after the other; directions that it does not have
        keep A as drawn beside a B of zero."""
        values, adapter = values.clone(), self._config.adapter
        root = math.sqrt(adapter.rank) if adapter.rslora else adapter.rank
        entries = {entry.name: entry for entry in self.layout.entries}
        for matrix in matrices(self.layout):
            own = entries[matrix.a.name.replace("lora_A", SPARSE)]
            (rank, width), (out, _) = matrix.a.shape, matrix.b.shape
            dense = torch.zeros(out * width, dtype=torch.float64)
            index = places(matrix.a.name, out, width, adapter.sparse)
            dense[index] = values[own.values].double()
            u, s, v = torch.linalg.svd(dense.view(out, width), full_matrices=False)
            found = min(rank, int((s > NOTHING * s.max()).sum()))
            u, v, size = u[:, :found], v[:found], (s[:found] * root / adapter.alpha).sqrt()
            sign = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
            a, b = (values[entry.values].view(entry.shape) for entry in (matrix.a, matrix.b))
            a[:found] = (size[:, None] * sign.T * v).float()
            b[:, :found] = (u * sign * size).float()
            values[own.values] = 0.0
        return values, 0.0

    def plan(self) -> Iterator[str]:
        lora, sparse = (self.layout.roles(*own).size for own in (("A", "B"), (SPARSE,)))
        yield (
            f"  of it {sparse * 4 / 1e6:.2f} MB of sparse values in the first {self._stage} rounds "
            f"only, and {lora * 4 / 1e6:.2f} MB of LoRA after them only (aggregation.rule=slora)"
        )
