"""A signal asks the run to stop: it sets a flag, which is acted upon where a round can be left.

USR1 (sbatch --signal), USR2 (submitit) and TERM (scancel, scontrol requeue) mean the same: the job
will be killed soon. The round in flight is finished if that fits the time left, else dropped when
just enough is left to end in good order.
"""

import signal
import time
from collections.abc import Callable
from types import FrameType

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)

# Exit code of a run that stopped between two rounds and wants to be resumed (EX_TEMPFAIL).
INTERRUPTED = 75

# Slurm kills 30 seconds after TERM (KillWait), whatever it was asked to do after other signals.
AFTER_TERM = 25.0

# What follows the training of a round may take this much longer than the slowest so far; while
# nothing is known of it, this fraction of the time is left for it.
MARGIN, UNKNOWN = 1.5, 0.5


class Stop:
    """What this rank knows about having to stop."""

    def __init__(self, grace: float, clock: Callable[[], float] = time.monotonic) -> None:
        """grace: seconds between USR1 or USR2 and the kill. clock: seconds."""
        self._grace = grace
        self._clock = clock
        self._asked: float | None = None
        self._trained: float | None = None
        # Seconds from the end of a round's training to its commit, of the slowest so far.
        self.tail: float | None = None

    def listen(self) -> None:
        """From now on signals set the flag, and no longer end the process."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
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
