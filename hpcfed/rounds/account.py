"""What a run costs: the round's record in metrics.jsonl, and the totals of summary.json."""

from dataclasses import dataclass
from typing import Any

from hpcfed.adapters.layout import HEAD, AdapterLayout
from hpcfed.errors import RunError
from hpcfed.round import Round
from hpcfed.rounds.tally import Tally
from hpcfed.state import RunState

FP32_BYTES = 4


@dataclass(frozen=True)
class Traffic:
    """What a client sends and gets in a round, in values, and what all did on the wire, in bytes.

    sizes: values of the shared part that each sampled client sends, and gets. vectors: of that
    size, each way: SCAFFOLD's control variates travel with the values. newcomers: clients that also
    get the personal part, as the server has it. tail: values of the personal part that each client
    sends besides, once.
    """

    sizes: dict[int, tuple[int, int]]
    vectors: int
    newcomers: int
    tail: int
    wire: int


class Account:
    """Adds up rounds, in the run's state."""

    def __init__(self, layout: AdapterLayout, state: RunState) -> None:
        self._layout = layout
        self._totals, self._seconds = state.totals, state.seconds.phases
        # Sample passes and seconds of selecting and scoring, which the next round's record carries.
        self._passes = 0
        self._pending: dict[str, float] = {}
        self._redrawn: list[dict[str, Any]] = []

    def before_the_round(self, passes: int, **seconds: float) -> None:
        """What choosing layers, or scoring everyone, has cost."""
        self._passes += passes
        self._pending |= seconds

    def redrawn(self, record: dict[str, Any]) -> None:
        """A draw of clients of which too few came through, which the next round's record carries;
        `record` has counted it."""
        self._redrawn.append({key: value for key, value in record.items() if key != "round"})

    def record(
        self,
        now: Round,
        tally: Tally,
        reasons: dict[int, str],
        traffic: Traffic,
        seconds: dict[str, float],
    ) -> dict[str, Any]:
        """The round's record; and its part of the totals. reasons: why clients failed."""
        failed = tally.failed
        updates = len(now.clients) - len(failed)
        split, shared_head = now.split, now.shared & self._layout.part([HEAD])
        head = shared_head.size
        sizes = traffic.sizes
        up = sum(sent for k, (sent, _) in sizes.items() if k not in failed) * traffic.vectors
        up += updates * traffic.tail
        down = sum(got for _, got in sizes.values()) * traffic.vectors
        down += len(now.clients) * split.fetched.size + traffic.newcomers * split.personal.size
        scored = int(tally.total("scored", failed_too=True)) + self._passes
        samples = int(tally.total("samples", failed_too=True)) + scored
        tokens = int(tally.total("tokens", failed_too=True))
        steps = int(tally.total("steps", failed_too=True))
        trained = tally.total("samples")
        for phase, value in self._pending.items():
            seconds[phase] += value
        self._passes, self._pending = 0, {}
        for phase, value in seconds.items():
            self._seconds[phase] += value
        totals = self._totals
        totals.samples += samples
        totals.scored += scored
        totals.tokens += tokens
        totals.steps += steps
        totals.failures += len(failed)
        totals.updates += updates
        totals.up += up * FP32_BYTES
        totals.down += down * FP32_BYTES
        totals.wire += traffic.wire
        redrawn, self._redrawn = self._redrawn, []
        return {
            "round": now.number + 1,
            "clients": list(now.clients),
            "failed": {str(k): reasons.get(k, "") for k in failed},
            "train_loss": float(tally.losses.sum() / trained) if trained else None,
            "samples": samples,
            "scored": scored,
            "tokens": tokens,
            "steps": steps,
            "shared_layers": list(now.shared.layers),
            "values": {"up": up, "down": down, "head": head},
            "bytes": {
                "up": up * FP32_BYTES,
                "down": down * FP32_BYTES,
                "wire": traffic.wire,
                "up_without_head": (up - updates * head) * FP32_BYTES,
            },
            "seconds": {**seconds, "evaluate": 0.0},
            **({"redrawn": redrawn} if redrawn else {}),
        }

    def evaluated(self, seconds: float, record: dict[str, Any] | None = None) -> None:
        """Seconds of an evaluation, of a round's record if it belongs to one."""
        self._seconds["evaluate"] += seconds
        if record is not None:
            record["seconds"]["evaluate"] = seconds

    def summary(self) -> dict[str, Any]:
        """summary.json's part of it."""
        totals = self._totals
        return {
            "samples": totals.samples,
            "scored": totals.scored,
            "tokens": totals.tokens,
            "steps": totals.steps,
            "bytes": {
                "up": totals.up,
                "down": totals.down,
                "wire": totals.wire,
                "up_if_all_shared": totals.updates * self._layout.trained.size * FP32_BYTES,
            },
            "failures": totals.failures,
        }


def too_few(record: dict[str, Any], draws: int, needed: int) -> RunError:
    """What ends a run whose round came to nothing, so many times. record: of the last draw."""
    client, why = next(iter(record["failed"].items()))
    return RunError(
        f"Round {record['round']} has come to nothing: in {draws} draws of "
        f"{len(record['clients'])} clients fewer than {needed} (federation.min_clients) came "
        f"through; client {client}: {why}. What is committed is kept: mend the cause and go on "
        "with --resume."
    )
