"""What a run costs: the round's line in metrics.jsonl, and the totals of summary.json."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hpcfed.adapters.layout import HEAD, AdapterLayout

FP32_BYTES = 4

# Of each sampled client, on the same wire as the values.
STATS = ("loss_sum", "samples", "steps", "failed", "scored", "density")
FAILED = STATS.index("failed")

PHASES = ("select", "score", "train", "exchange", "evaluate")


@dataclass
class Totals:
    """The names are those of summary.json."""

    samples: int = 0
    scored: int = 0
    steps: int = 0
    updates: int = 0
    failures: int = 0
    up: int = 0
    down: int = 0
    wire: int = 0


@dataclass(frozen=True)
class Traffic:
    """What a client sends and gets in a round, in values, and what all did on the wire, in bytes.

    vectors: of the shared size, each way: SCAFFOLD's control variates travel with the values.
    newcomers: clients that also get `personal`, what the warm-up made of layers that stay home.
    """

    shared_blocks: tuple[str, ...]
    vectors: int
    newcomers: int
    personal: int
    wire: int


class Account:
    """Adds up rounds. All of it is the same on every rank, but for seconds."""

    def __init__(self, layout: AdapterLayout) -> None:
        self._layout = layout
        self.totals = Totals()
        self.seconds = dict.fromkeys(PHASES, 0.0)
        # Sample passes and seconds of selecting and scoring, which the next round's line carries.
        self.charged = 0
        self.pending: dict[str, float] = {}

    def line(
        self,
        number: int,
        sampled: list[int],
        reasons: dict[int, str],
        stats: npt.NDArray[np.float64],
        traffic: Traffic,
        seconds: dict[str, float],
    ) -> dict[str, Any]:
        """The round's line, and its share of the totals. stats: (len(sampled), len(STATS));
        reasons: why clients failed, by client."""
        column = dict(zip(STATS, stats.T, strict=True))
        well = column["failed"] == 0
        failed = [k for k, fine in zip(sampled, well, strict=True) if not fine]
        updates = int(well.sum())
        values, head = self._layout.count(traffic.shared_blocks), self._layout.count([HEAD])
        up = updates * values * traffic.vectors
        down = len(sampled) * values * traffic.vectors + traffic.newcomers * traffic.personal
        scored = int(column["scored"].sum()) + self.charged
        samples, steps = int(column["samples"].sum()) + scored, int(column["steps"].sum())
        trained = float(column["samples"] @ well)
        for phase, value in self.pending.items():
            seconds[phase] += value
        self.charged, self.pending = 0, {}
        for phase, value in seconds.items():
            self.seconds[phase] += value
        totals = self.totals
        totals.samples += samples
        totals.scored += scored
        totals.steps += steps
        totals.failures += len(failed)
        totals.updates += updates
        totals.up += up * FP32_BYTES
        totals.down += down * FP32_BYTES
        totals.wire += traffic.wire
        return {
            "round": number + 1,
            "clients": sampled,
            "failed": {str(k): reasons.get(k, "") for k in failed},
            "train_loss": float(column["loss_sum"].sum() / trained) if trained else None,
            "samples": samples,
            "scored": scored,
            "steps": steps,
            "shared_layers": [b for b in traffic.shared_blocks if b != HEAD],
            "values": {"up": up, "down": down, "head": head},
            "bytes": {
                "up": up * FP32_BYTES,
                "down": down * FP32_BYTES,
                "wire": traffic.wire,
                "up_without_head": (up - updates * head) * FP32_BYTES,
            },
            "seconds": {**seconds, "evaluate": 0.0},
        }

    def evaluated(self, seconds: float, line: dict[str, Any] | None = None) -> None:
        """Seconds of an evaluation, of a round's line if it belongs to one."""
        self.seconds["evaluate"] += seconds
        if line is not None:
            line["seconds"]["evaluate"] = seconds

    def summary(self) -> dict[str, Any]:
        """summary.json's part of it."""
        totals = self.totals
        return {
            "samples": totals.samples,
            "scored": totals.scored,
            "steps": totals.steps,
            "bytes": {
                "up": totals.up,
                "down": totals.down,
                "wire": totals.wire,
                "up_if_all_shared": totals.updates * self._layout.size * FP32_BYTES,
            },
            "failures": totals.failures,
        }
