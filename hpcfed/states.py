"""What clients keep between their rounds: files in the run directory, and who has one."""

from collections.abc import Collection

import torch

from hpcfed.run import RunDirectory


class ClientStates:
    """One kind of client state. The map says which round's file is a client's current one, and is
    the same on all ranks; the tensors live in the file and in the slot that runs the client."""

    def __init__(self, kind: str, directory: RunDirectory, writes: bool) -> None:
        """writes: this rank deletes files that nothing refers to any more."""
        self.current: dict[int, int] = {}
        self._kind = kind
        self._directory = directory
        self._writes = writes
        self._pinned: dict[int, int] = {}

    def load(self, client: int, at: dict[int, int] | None = None) -> dict[str, torch.Tensor] | None:
        """A client's tensors, by default its current ones; None if it has none."""
        number = (self.current if at is None else at).get(client)
        if number is None:
            return None
        return self._directory.load_state(self._kind, client, number)

    def save(self, client: int, number: int, tensors: dict[str, torch.Tensor]) -> None:
        """By one rank of the slot that ran the client; not current until `keep`."""
        self._directory.save_state(self._kind, client, number, tensors)

    def keep(self, number: int, clients: Collection[int]) -> None:
        """From now on these clients' state is this round's."""
        for client in clients:
            old = self.current.get(client)
            self.current[client] = number
            if old is not None and old != number and self._pinned.get(client) != old:
                self._drop(client, old)

    def pin(self) -> dict[int, int]:
        """Keep the files that are current now until the next pin; returns the map."""
        stale, self._pinned = self._pinned, dict(self.current)
        for client, old in stale.items():
            if self.current.get(client) != old:
                self._drop(client, old)
        return self._pinned

    def _drop(self, client: int, number: int) -> None:
        if self._writes:
            self._directory.drop_state(self._kind, client, number)
