"""A signal asks the run to stop: it sets a flag, which is acted upon where a round can be left.

USR1 (sbatch --signal), USR2 (submitit), TERM (scancel, scontrol requeue), HUP (a terminal that is
closed) and INT (Ctrl-C) mean the same: the job will be killed soon. The round in flight is finished
if that fits the time left, else dropped when just enough is left to end in good order. A second INT
ends the process at once.
"""

import os
import signal
import time
from collections.abc import Callable
from types import FrameType

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)

# Exit code of a run that stopped between two rounds and wants to be resumed (EX_TEMPFAIL).
INTERRUPTED = 75

# Slurm kills 30 seconds after TERM (KillWait), whatever it was asked to do after other signals.
AFTER_TERM = 25.0

# What follows the training of a round may take this much longer than the slowest so far; while
# nothing is known of it, this fraction of the time is left for it.
MARGIN, UNKNOWN = 1.5, 0.5


def heard() -> list[signal.Signals]:
    """The signals that this process does not ignore, as it ignores HUP under nohup."""
    return [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


def say_stopping(seconds: float) -> None:
    """To somebody who has pressed Ctrl-C; from a signal's handler."""
    text = (
        f"hpcfed: stopping; the round in flight has {seconds:g} s (cluster.grace_seconds) to end, "
        "or is dropped. Ctrl-C again ends at once.\n"
    )
    os.write(2, text.encode())


class Stop:
    """What this rank knows about having to stop."""

    def __init__(self, grace: float, clock: Callable[[], float] = time.monotonic) -> None:
        """grace: seconds between USR1 or USR2 and the kill. clock: seconds."""
        self._grace = grace
        self._clock = clock
        self._asked: float | None = None
        self._interrupted = False  # by Ctrl-C
        self._trained: float | None = None
        # Seconds from the end of a round's training to its commit, of the slowest so far.
        self.tail: float | None = None

    def listen(self) -> None:
        """From now on signals set the flag, and no longer end the process."""
        for number in heard():
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
            say_stopping(self._grace)
        if self._asked is None:
            self._asked = self._clock()
            if number == signal.SIGTERM:
                self._grace = min(self._grace, AFTER_TERM)

    @property
    def asked(self) -> bool:
        """Whether a signal has come."""
        return self._asked is not None

    def trained(self) -> None:
        """A round's training has ended."""
        self._trained = self._clock()

    def committed(self) -> None:
        """The round is committed."""
        if self._trained is not None:
            self.tail = max(self.tail or 0.0, self._clock() - self._trained)

    @property
    def must_drop(self) -> bool:
        """Whether what is left of the time is only enough to end without the round in flight."""
        if self._asked is None:
            return False
        tail = self._grace * UNKNOWN if self.tail is None else self.tail * MARGIN
        return self._clock() >= self._asked + self._grace - tail
