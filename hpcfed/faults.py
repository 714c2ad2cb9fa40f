"""Failures on purpose: to rehearse what a run does when a client, a rank or a disk gives up.

HPCFED_FAIL_AT="round=2 client=3 kind=oom; round=4 rank=1 kind=sigkill in=exchange" strikes client 3
in round 2 (from 1), and rank 1 where round 4 is exchanged. `in` is train unless told.

    exception    raised in the client's forward; elsewhere at the beginning of the phase
    oom          out of memory, in the client's backward (train only)
    nan          a gradient that is not a number (train only)
    slow         SLOW seconds of nothing
    hang         for ever
    sigkill      the process is killed
    disk_full    no space left on the device (commit only)
    torn_file    the round's tensors are cut in half after the commit, and the process killed
                 (commit only)
"""

import errno
import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hpcfed.errors import UserError

if TYPE_CHECKING:
    import torch

VARIABLE = "HPCFED_FAIL_AT"
SLOW = 5.0
PHASES = ("select", "score", "train", "exchange", "evaluate", "commit")
_ANYWHERE = ("exception", "slow", "hang", "sigkill")
_ONLY = {"oom": "train", "nan": "train", "disk_full": "commit", "torn_file": "commit"}


_NUMBER = re.compile("[0-9]{1,9}")


class RehearsedError(RuntimeError):
    """A failure that was asked for."""


@dataclass(frozen=True)
class Fault:
    """One failure. round: from 1. client, rank: None = any."""

    round: int
    kind: str
    phase: str = "train"
    client: int | None = None
    rank: int | None = None


def parse(text: str) -> tuple[Fault, ...]:
    """The faults in HPCFED_FAIL_AT. Raises UserError for what is none."""
    return tuple(_fault(part) for part in text.split(";") if part.strip())


def _fault(text: str) -> Fault:
    pairs = dict(word.partition("=")[::2] for word in text.split())
    numbers = {key: pairs.pop(key) for key in ("round", "client", "rank") if key in pairs}
    kind, phase = pairs.pop("kind", ""), pairs.pop("in", None)
    phase = phase or _ONLY.get(kind, "train")
    known = kind in _ANYWHERE or _ONLY.get(kind) == phase
    whole = "round" in numbers and all(_NUMBER.fullmatch(value) for value in numbers.values())
    if pairs or not known or not whole or phase not in PHASES or not int(numbers["round"]):
        raise UserError(
            f"{VARIABLE}: {text.strip()!r} is no failure; it must look like 'round=2 client=3 "
            f"kind=oom' or 'round=2 rank=1 kind=hang in=exchange', with a kind of "
            f"{', '.join((*_ANYWHERE, *_ONLY))} and a phase of {', '.join(PHASES)}."
        )
    at = {key: int(value) for key, value in numbers.items()}
    return Fault(at["round"], kind, phase, at.get("client"), at.get("rank"))


class Rehearsal:
    """The faults that strike this rank."""

    def __init__(self, rank: int, faults: tuple[Fault, ...]) -> None:
        self._faults = [fault for fault in faults if fault.rank in (None, rank)]
        self._struck: set[Fault] = set()
        self._pending: Fault | None = None  # strikes inside the client's step
        self._round = 0

    @staticmethod
    def from_environment(rank: int) -> "Rehearsal":
        """What HPCFED_FAIL_AT asks for; nothing where it is not set."""
        return Rehearsal(rank, parse(os.environ.get(VARIABLE, "")))

    def enter(self, phase: str, round_number: int | None = None, client: int | None = None) -> None:
        """This rank begins a phase of a round (from 1; None: of the one it is in), for a client if
        it is one's."""
        self._pending = None
        self._round = self._round if round_number is None else round_number
        for fault in self._faults:
            here = fault.phase == phase and fault.round == self._round
            if not here or fault in self._struck or fault.client not in (None, client):
                continue
            if fault.client is None:
                self._struck.add(fault)  # once; a client's own whenever it is its turn
            if phase == "train" and fault.kind in ("exception", "oom", "nan"):
                self._pending = fault
            else:
                self._strike(fault)

    def _strike(self, fault: Fault) -> None:
        if fault.kind == "slow":
            time.sleep(SLOW)
        elif fault.kind == "hang":
            while True:
                time.sleep(1.0)
        elif fault.kind == "sigkill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.kind == "disk_full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "rehearsed")
        elif fault.kind == "torn_file":
            self._pending = fault  # after the commit
        else:
            raise RehearsedError(f"rehearsed in {fault.phase}")

    def committed(self, tensors: Path) -> None:
        """The round's tensors lie in this file."""
        if self._pending is not None and self._pending.kind == "torn_file":
            os.truncate(tensors, tensors.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def losses(self, losses: "torch.Tensor", first: "torch.Tensor") -> "torch.Tensor":
        """The losses (rows,) of a training step's forward; a fault in the step strikes here, or in
        its backward, once. first: the trained values that backward comes to last."""
        fault, self._pending = self._pending, None
        if fault is None:
            return losses
        if fault.kind == "exception":
            raise RehearsedError("rehearsed in train")
        import torch

        if fault.kind == "nan":
            losses = losses * 1.0
            losses.register_hook(lambda own: own * torch.nan)  # type: ignore[no-untyped-call]
            return losses

        def give_up(gradient: torch.Tensor) -> torch.Tensor:
            handle.remove()
            raise torch.OutOfMemoryError("out of memory, rehearsed in backward")

        handle = first.register_hook(give_up)  # type: ignore[no-untyped-call]
        return losses
