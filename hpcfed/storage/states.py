"""What clients keep between their rounds: files in the run directory, and who has one."""

from collections.abc import Collection, Mapping

import torch

from hpcfed.state import ClientFiles
from hpcfed.storage.run import RunDirectory


class ClientStates:
    """One kind of client state. `files` says which round's file is a client's current one, and is
    the same on all ranks; the tensors live in the file and in the slot that runs the client.

    Files that nothing refers to any more are deleted by `sweep`, after the next commit: until then
    the last one refers to them.
    """

    def __init__(
        self, kind: str, files: ClientFiles, directory: RunDirectory, writes: bool
    ) -> None:
        """writes: this rank deletes files."""
        self.kind = kind
        self.files = files
        self._directory = directory
        self._writes = writes
        self._stale: list[tuple[int, int]] = []

    def load(
        self, client: int, at: Mapping[int, int] | None = None
    ) -> dict[str, torch.Tensor] | None:
        """A client's tensors, by default its current ones; None if it has none."""
        round_number = (self.files.current if at is None else at).get(client)
        if round_number is None:
            return None
        return self._directory.load_state(self.kind, client, round_number)

    def save(self, client: int, round_number: int, tensors: dict[str, torch.Tensor]) -> None:
        """By one rank of the slot that ran the client; not current until `accept`."""
        self._directory.save_state(self.kind, client, round_number, tensors)

    def accept(self, round_number: int, clients: Collection[int]) -> None:
        """From now on these clients' state is this round's."""
        current, pinned = self.files.current, self.files.pinned
        for client in clients:
            old = current.get(client)
            current[client] = round_number
            if old is not None and old != round_number and pinned.get(client) != old:
                self._stale.append((client, old))

    def reject(self, round_number: int, clients: Collection[int]) -> None:
        """What these clients may have saved in this round is not to be used."""
        self._stale += [(client, round_number) for client in clients]

    def pin(self) -> None:
        """Keep the files that are current now until the next pin."""
        current, before = self.files.current, self.files.pinned
        self.files.pinned = dict(current)
        self._stale += [pair for pair in before.items() if current.get(pair[0]) != pair[1]]

    def sweep(self) -> None:
        """Delete what is neither current nor pinned."""
        current, pinned = self.files.current, self.files.pinned
        for client, round_number in self._stale if self._writes else ():
            if round_number in (current.get(client), pinned.get(client)):
                continue  # rejected, and drawn again in the same round
            self._directory.drop_state(self.kind, client, round_number)
        self._stale = []
