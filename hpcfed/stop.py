"""A signal asks the run to stop: it sets a flag, which is acted upon where a round can be left.

USR1 (sbatch --signal), USR2 (submitit) and TERM (scancel, scontrol requeue) mean the same: the job
will be killed soon. The round in flight is finished if that fits the time left, else dropped.
"""

import signal
import time
from types import FrameType

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)

# Exit code of a run that stopped between two rounds and wants to be resumed (EX_TEMPFAIL).
INTERRUPTED = 75

# Slurm kills 30 seconds after TERM (KillWait), whatever it was asked to do after other signals.
AFTER_TERM = 25.0

# A round may take this much longer than the slowest so far, and is still thought to fit.
MARGIN = 1.2


class Stop:
    """What this rank knows about having to stop."""

    def __init__(self, grace: float) -> None:
        """grace: seconds between USR1 or USR2 and the kill."""
        self._grace = grace
        self._asked: float | None = None
        self._round_until: float | None = None

    def listen(self) -> None:
        """From now on signals set the flag, and no longer end the process."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked is None:
            self._asked = time.monotonic()
            if number == signal.SIGTERM:
                self._grace = min(self._grace, AFTER_TERM)

    @property
    def asked(self) -> bool:
        """Whether a signal has come."""
        return self._asked is not None

    def round_begins(self, expected: float | None) -> None:
        """expected: seconds that a round takes, as far as known."""
        self._round_until = None if expected is None else time.monotonic() + expected * MARGIN

    @property
    def must_drop(self) -> bool:
        """Whether the round in flight would not end in the time left."""
        if self._asked is None:
            return False
        return self._round_until is None or self._round_until > self._asked + self._grace
