"""What clients keep between their rounds: files in the run directory, and who has one."""

from collections.abc import Collection, Mapping

import torch

from hpcfed.state import ClientFiles
from hpcfed.storage.run import RunDirectory


class ClientStates:
    """One kind of client state. `files` says which round's file is a client's current one, and is
    the same on all ranks; the tensors live in the file and in the slot that runs the client.

    Two commits are kept. What is replaced is deleted by the second `sweep` from then on, after the
    second commit that does not refer to it.
    """

    def __init__(
        self, kind: str, files: ClientFiles, directory: RunDirectory, writes: bool
    ) -> None:
        """writes: this rank deletes files."""
        self.kind = kind
        self.files = files
        self._directory = directory
        self._writes = writes
        self._before, files.replaced = files.replaced, set()
        self._rejected: set[tuple[int, int]] = set()

    def load(
        self, client: int, at: Mapping[int, int] | None = None
    ) -> dict[str, torch.Tensor] | None:
        """A client's tensors, by default its current ones; None if it has none."""
        round_number = (self.files.current if at is None else at).get(client)
        if round_number is None:
            return None
        return self._directory.clients.load(self.kind, client, round_number)

    def save(self, client: int, round_number: int, tensors: dict[str, torch.Tensor]) -> None:
        """By one rank of the slot that ran the client; not current until `accept`."""
        self._directory.clients.save(self.kind, client, round_number, tensors)

    def accept(self, round_number: int, clients: Collection[int]) -> None:
        """From now on these clients' state is this round's."""
        current, pinned = self.files.current, self.files.pinned
        for client in clients:
            old = current.get(client)
            current[client] = round_number
            if old is not None and old != round_number and pinned.get(client) != old:
                self.files.replaced.add((client, old))

    def reject(self, round_number: int, clients: Collection[int]) -> None:
        """What these clients may have saved in this round is not to be used."""
        self._rejected |= {(client, round_number) for client in clients}

    def pin(self) -> None:
        """Keep the files that are current now until the next pin."""
        current, before = self.files.current, self.files.pinned
        self.files.pinned = dict(current)
        self.files.replaced |= {
            (client, number) for client, number in before.items() if current.get(client) != number
        }

    def sweep(self) -> None:
        """After a commit: delete what neither it nor the one before refers to, and what was
        rejected."""
        current, pinned = self.files.current, self.files.pinned
        rejected = {
            (client, number)
            for client, number in self._rejected
            if number not in (current.get(client), pinned.get(client))  # drawn again in the round
        }
        for client, round_number in sorted(self._before | rejected) if self._writes else ():
            self._directory.clients.drop(self.kind, client, round_number)
        self._before, self.files.replaced = self.files.replaced, set()
        self._rejected = set()
