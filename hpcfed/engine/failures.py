"""Failures of clients, and how they are told: in a line, and the first of a kind in full."""

import contextlib
import logging
from collections.abc import Iterator

from hpcfed.errors import place, reason


class ClientError(Exception):
    """This client's update is lost; the federation goes on. All ranks of the slot raise it."""


class StopError(Exception):
    """The job has to stop: what is not committed is dropped. All ranks of the world raise it."""


class Failures:
    """Of one rank. A kind is a type of exception, and where it was raised. silenced: none is told
    in full for now."""

    def __init__(self) -> None:
        self._kinds: set[str] = set()
        self.silenced = False

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """Meanwhile none is told with its traceback."""
        self.silenced = True
        try:
            yield
        finally:
            self.silenced = False

    def told(self, error: Exception) -> str:
        """A failure in one line; the first of its kind also with its traceback, in the log."""
        kind = f"{type(error).__name__} {place(error)}"
        if kind not in self._kinds and not self.silenced:
            self._kinds.add(kind)
            logging.getLogger("hpcfed").warning(
                "a client failed; of such failures only this first one is told in full:",
                exc_info=error,
            )
        return reason(error)
