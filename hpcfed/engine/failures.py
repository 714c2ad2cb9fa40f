"""Failures of clients, and how they are told: in a line, and the first of a kind in full."""

import contextlib
import logging
from collections.abc import Iterator

from torch import nn

from hpcfed.errors import place, reason


class ClientError(Exception):
    """This client's update is lost; the federation goes on. All ranks of the slot raise it."""


class StopError(Exception):
    """The job has to stop: what is not committed is dropped. All ranks of the world raise it."""


class Failures:
    """Of one rank. A kind is a type of exception, and where it was raised. silenced: none is told
    in full for now."""

    def __init__(self, network: nn.Module, collective: bool) -> None:
        """collective: other ranks take part in each forward of the network, as under ZeRO-3, and
        wait for a rank that has left it."""
        self._kinds: set[str] = set()
        self.silenced = False
        self._inside = False
        if collective:
            network.register_forward_pre_hook(lambda *_: self._enter(True))
            network.register_forward_hook(lambda *_: self._enter(False))

    def _enter(self, inside: bool) -> None:
        self._inside = inside

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """Meanwhile none is told with its traceback."""
        self.silenced = True
        try:
            yield
        finally:
            self.silenced = False

    def told(self, error: Exception) -> str:
        """A failure in one line; the first of its kind also with its traceback, in the log.

        Raises it again if others wait for this rank: it ends the job.
        """
        if self._inside:
            self._inside = False
            raise error
        kind = f"{type(error).__name__} {place(error)}"
        if kind not in self._kinds and not self.silenced:
            self._kinds.add(kind)
            logging.getLogger("hpcfed").warning(
                "a client failed; of such failures only this first one is told in full:",
                exc_info=error,
            )
        return reason(error)
