"""What a round's clients did, in numbers: the statistics that travel with the exchange."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from hpcfed.round import Outcome


class Tally:
    """One flat vector of float64, which is summed over the slots: a row for each sampled client, of
    COLUMNS and, where it is asked for, of how far it moved each of so many `layers`; seconds of
    scoring and training for each slot; and two counts of ranks: asked to stop, and left in the
    middle of the round."""

    COLUMNS = ("loss_sum", "samples", "tokens", "steps", "failed", "scored", "density")
    SECONDS = ("score", "train")

    def __init__(self, clients: Sequence[int], slots: int, layers: int = 0) -> None:
        self.clients = tuple(clients)
        self._slots, self._layers = slots, layers
        rows, columns = len(clients), len(self.COLUMNS) + layers
        self.numbers = np.zeros(rows * columns + slots * len(self.SECONDS) + 2)
        # Views into it.
        table, seconds, self._signals = np.split(
            self.numbers, [rows * columns, len(self.numbers) - 2]
        )
        self._table = table.reshape(rows, columns)
        self.seconds = seconds.reshape(slots, len(self.SECONDS))
        # Why clients of this slot failed.
        self.reasons: dict[int, str] = {}

    def note(self, client: int, outcome: Outcome) -> None:
        """What a client of this slot did. Losses are this rank's part of it."""
        failed = outcome.values is None
        if failed:
            self.reasons[client] = outcome.reason
        self._table[self.clients.index(client)] = (
            outcome.loss_sum, outcome.samples, outcome.tokens, outcome.steps, failed,
            outcome.scored, outcome.density, *(outcome.moved or (0.0,) * self._layers),
        )  # fmt: skip

    @property
    def losses(self) -> npt.NDArray[np.float64]:
        """(clients,): a view."""
        return self._table[:, 0]

    def signal(self, asked: float, left: bool) -> None:
        """asked: how many ranks of this slot were asked to stop. left: whether it left a step."""
        self._signals[:] = asked, left

    def summed(self, numbers: npt.NDArray[np.float64]) -> "Tally":
        """The tally of all slots, from the sum of their numbers; the reasons stay here."""
        whole = Tally(self.clients, self._slots, self._layers)
        whole.numbers[:] = numbers
        whole.reasons = self.reasons
        return whole

    @property
    def asked(self) -> bool:
        """Whether a rank was asked to stop."""
        return bool(self._signals[0])

    @property
    def left(self) -> bool:
        """Whether a slot left the round."""
        return bool(self._signals[1])

    def column(self, name: str) -> npt.NDArray[np.float64]:
        """(clients,)."""
        return self._table[:, self.COLUMNS.index(name)]

    @property
    def moved(self) -> npt.NDArray[np.float64]:
        """(clients, layers) squared norms of their updates; zeros of those that failed."""
        return self._table[:, len(self.COLUMNS) :]

    @property
    def failed(self) -> list[int]:
        """Clients whose update is lost."""
        return self._which(failed=True)

    @property
    def succeeded(self) -> list[int]:
        """The others."""
        return self._which(failed=False)

    def _which(self, failed: bool) -> list[int]:
        column = self.column("failed")
        return [k for k, value in zip(self.clients, column, strict=True) if bool(value) == failed]

    def total(self, name: str, failed_too: bool = False) -> float:
        """Sum of a column over the clients that did not fail."""
        column = self.column(name)
        return float(column.sum() if failed_too else column @ (self.column("failed") == 0))

    @property
    def longest(self) -> npt.NDArray[np.float64]:
        """(2,) SECONDS of the slot that took longest."""
        longest: npt.NDArray[np.float64] = self.seconds[self.seconds.sum(1).argmax()]
        return longest
