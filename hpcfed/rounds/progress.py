"""What a person sees of a run: a live bar on a terminal, one plain line a round in a log file."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm


@dataclass(frozen=True)
class Opening:
    """What runs where. frozen, trainable: values. seconds: until it was ready. done: rounds of
    earlier lives, and up: what they have sent, in bytes."""

    what: str
    training_rows: int
    clients: int
    per_round: int
    rounds: int
    model: str
    frozen: int
    trainable: int
    ranks: int
    slots: int
    threads: int
    device: str
    seconds: float
    folder: Path
    done: int
    up: int
    notes: tuple[str, ...] = ()


class Progress:
    """Prints on rank 0 and is silent elsewhere; `live` draws a bar that follows the clients."""

    def __init__(self, speaks: bool, live: bool = False) -> None:
        self._speaks = speaks
        self._terminal = _terminal() if speaks and live else None
        self._bar: Any = None
        self._rounds = self._per_round = 0
        self._first = 0  # rounds of earlier lives
        self._up = 0
        self._validation = ""
        self._began = time.monotonic()

    def start(self, opening: Opening) -> None:
        """Say what runs where."""
        if not self._speaks:
            return
        self._rounds, self._first, self._up = opening.rounds, opening.done, opening.up
        self._per_round = opening.per_round
        self._began = time.monotonic()
        per_client = opening.ranks // opening.slots
        self._say(
            f"{opening.what}: {opening.training_rows} training rows, {opening.clients} clients, "
            f"{opening.per_round} a round, {opening.rounds} rounds\n"
            f"{opening.model}: {opening.frozen / 1e6:.1f}M frozen values, "
            f"{opening.trainable:,} trainable ({opening.trainable * 4 / 1e6:.2f} MB)\n"
            f"{_many(opening.ranks, 'rank')} = {_many(opening.slots, 'slot')} x "
            f"{_many(per_client, 'ZeRO rank')}, {_many(opening.threads, 'thread')} a rank, "
            f"{opening.device}; ready after {opening.seconds:.1f} s -> {opening.folder}"
        )
        for note in opening.notes:
            self._say(note)
        if self._first:
            self._say(f"goes on after round {self._first}, the last one committed")
        if self._terminal is not None:
            self._bar = tqdm(
                total=opening.rounds * opening.per_round,
                initial=self._first * opening.per_round,
                unit="client",
                leave=False,
                file=self._terminal,
                dynamic_ncols=True,
            )

    def chose(self, round_number: int, record: dict[str, Any]) -> None:
        """The shared layers are chosen, before round `round_number` (from 0)."""
        if not self._speaks or record["score"] == "all":
            return
        scores = record.get("scores")
        why = "  ".join(f"{k}: {v:.3f}" for k, v in scores.items()) if scores else ""
        agreed = list(record.get("agreement", {}).values())
        far = f"; clients agree by {sum(agreed) / len(agreed):.3f}" if agreed else ""
        self._say(
            f"shared from round {round_number + 1} on: layers {' '.join(record['shared_layers'])} "
            f"and the head, by {record['score']}" + (f" ({why})" if why else "") + far
        )

    def client(self, client: int) -> None:
        """One client of this slot is done."""
        if self._bar is not None:
            so_far = f"{self._up / 1e6:.1f} MB up"
            self._bar.set_postfix_str(f"client {client}, {self._validation}{so_far}", refresh=False)
            self._bar.update(1)

    def round(self, record: dict[str, Any]) -> None:
        """One round is done."""
        if not self._speaks:
            return
        self._up += record["bytes"]["up"]
        done = record["round"]
        each = (time.monotonic() - self._began) / (done - self._first)
        left = each * (self._rounds - done)
        loss = "  n/a " if record["train_loss"] is None else f"{record['train_loss']:.4f}"
        text = f"round {done:>3}/{self._rounds}  loss {loss}"
        if "share" in record:
            text += f"  data {record['share']:4.0%}"
        if "validation" in record:
            text += f"  validation {record['validation']['personal']['score']:.4f}"
            self._validation = f"validation {record['validation']['personal']['score']:.4f}, "
        else:
            text += " " * 19
        took = sum(record["seconds"].values())
        text += f"  up {self._up / 1e6:8.2f} MB  {took:6.1f} s  {_clock(left)} left"
        if "privacy" in record:
            text += f"  epsilon {record['privacy']['epsilon']:.3f}"
        text += _failed(record)
        for client, reason in record.get("not_evaluated", {}).items():
            text += f"\n  client {client} was not evaluated as a whole: {reason}"
        if self._bar is not None:
            self._bar.update(done * self._per_round - self._bar.n)
        self._say(text)

    def redraws(self, record: dict[str, Any], needed: int) -> None:
        """A draw of the round's clients came to nothing."""
        if not self._speaks:
            return
        came = len(record["clients"]) - len(record["failed"])
        text = f"round {record['round']:>3}/{self._rounds}  {came} of {len(record['clients'])} "
        text += f"clients came through, {needed} must (federation.min_clients): others are drawn"
        self._say(text + _failed(record))

    def interrupted(self, rounds: int) -> None:
        """The job has to stop; so many rounds are committed."""
        if self._bar is not None:
            self._bar.close()
        if self._speaks:
            self._say(
                f"a signal asked to stop: {rounds} of {self._rounds} rounds are committed; go on "
                "with --resume"
            )

    def finish(self, summary: dict[str, Any]) -> None:
        """The result, and where everything lies."""
        if self._bar is not None:
            self._bar.close()
        if not self._speaks:
            return
        sent, spent = summary["bytes"], summary["seconds"]
        if summary["test"] is None:
            self._say("\nthe test split was not looked at (evaluation.test=false)")
        else:
            self._scores(summary)
        less = sent["up"] / sent["up_if_all_shared"] if sent["up_if_all_shared"] else 1
        shared = f" ({less:.0%} of sharing all layers)" if less < 1 else ""
        scored = f" ({summary['scored']:,} of them scored only)" if summary["scored"] else ""
        if "privacy" in summary:
            own = summary["privacy"]
            self._say(
                f"privacy        epsilon {own['epsilon']:.3f} at delta {own['delta']:g} for each "
                f"{'client' if own['unit'] == 'client' else 'row'} (noise {own['noise']:g})"
                + ("" if own["secret"] else ", if the seed were a secret")
            )
            if own["ended_early"]:
                self._say(" " * 15 + own["ended_early"])
        self._say(
            f"bytes          up {sent['up'] / 1e6:.2f} MB{shared}  down {sent['down'] / 1e6:.2f} MB"
            f"  on the wire {sent['wire'] / 1e6:.2f} MB\n"
            f"work           {summary['samples']:,} samples{scored}, {summary['steps']:,} steps,"
            f" {summary['failures']} failed updates\n"
            "seconds        " + "  ".join(f"{name} {value:.1f}" for name, value in spent.items())
        )

    def _scores(self, summary: dict[str, Any]) -> None:
        """The result on the test split."""
        best = summary["best"]
        what = "accuracy" if "accuracy" in summary else "score"
        scores = summary[what]
        of_one = f"  (majority class {summary['majority']:.4f})" if "majority" in summary else ""
        self._say(
            f"\ntest {what}  personal {scores['personal']:.4f}  global {scores['global']:.4f}"
            + of_one
        )
        if what == "accuracy" and summary["metric"] != "accuracy":
            self._say(f"test {summary['metric']}  personal {summary['score']['personal']:.4f}")
        first = {"before the first round": summary["before"]} if "before" in summary else {}
        if first and what == "accuracy":
            self._say(f"test accuracy  before the first round {summary['before']['accuracy']:.4f}")
        for name in ("perplexity", "exact_match", "f1", "rouge_l"):
            told = {**summary["test"], **first}
            each = [f"{n} {own[name]:.4f}" for n, own in told.items() if name in own]
            if what == "score" and each:
                self._say(f"test {name}  {'  '.join(each)}")
        if "rounded" in summary:
            self._say(f"({summary['rounded']})")
        if best is not None:
            self._say(
                f"best round by validation: {best['round']}"
                f" (test {what} {best['personal'][what]:.4f})"
            )

    def _say(self, text: str) -> None:
        """One or more lines, above the bar if there is one."""
        if self._terminal is not None:
            tqdm.write(text, file=self._terminal)
            self._terminal.flush()
        else:
            print(text, flush=True)


def _failed(record: dict[str, Any]) -> str:
    """A line for each client that failed."""
    lines = [
        f"\n  client {client} failed and was left out: {reason}"
        for client, reason in record["failed"].items()
    ]
    return "".join(lines)


def _terminal() -> TextIO | None:
    """Where a bar can be drawn. mpiexec holds back what does not end in a new line, so under it
    the terminal is opened by its own name; there may be none."""
    if sys.stderr.isatty():
        return sys.stderr
    try:
        return open("/dev/tty", "w")
    except OSError:
        return None


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s'[: count > 1]}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
