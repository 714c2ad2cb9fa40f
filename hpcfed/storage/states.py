"""What clients keep between their rounds: files in the run directory, and who has one."""

from collections.abc import Collection

import torch

from hpcfed.storage.run import RunDirectory


class ClientStates:
    """One kind of client state. The map says which round's file is a client's current one, and is
    the same on all ranks; the tensors live in the file and in the slot that runs the client.

    Files that nothing refers to any more are deleted by `sweep`, after the next commit: until then
    the last one refers to them.
    """

    def __init__(self, kind: str, directory: RunDirectory, writes: bool) -> None:
        """writes: this rank deletes files."""
        self.kind = kind
        self.current: dict[int, int] = {}
        self.pinned: dict[int, int] = {}
        self._directory = directory
        self._writes = writes
        self._stale: list[tuple[int, int]] = []

    def load(self, client: int, at: dict[int, int] | None = None) -> dict[str, torch.Tensor] | None:
        """A client's tensors, by default its current ones; None if it has none."""
        number = (self.current if at is None else at).get(client)
        if number is None:
            return None
        return self._directory.load_state(self.kind, client, number)

    def save(self, client: int, number: int, tensors: dict[str, torch.Tensor]) -> None:
        """By one rank of the slot that ran the client; not current until `keep`."""
        self._directory.save_state(self.kind, client, number, tensors)

    def keep(self, number: int, clients: Collection[int]) -> None:
        """From now on these clients' state is this round's."""
        for client in clients:
            old = self.current.get(client)
            self.current[client] = number
            if old is not None and old != number and self.pinned.get(client) != old:
                self._stale.append((client, old))

    def pin(self) -> dict[int, int]:
        """Keep the files that are current now until the next pin; returns the map."""
        stale, self.pinned = self.pinned, dict(self.current)
        self._stale += [own for own in stale.items() if self.current.get(own[0]) != own[1]]
        return self.pinned

    def sweep(self) -> None:
        """Delete what is neither current nor pinned."""
        for client, number in self._stale if self._writes else ():
            self._directory.drop_state(self.kind, client, number)
        self._stale = []

    def maps(self) -> dict[str, dict[int, int]]:
        """Which files are in use, for a commit."""
        return {"current": self.current, "pinned": self.pinned}

    def restore(self, maps: dict[str, dict[str, int]]) -> None:
        """What `maps` gave, with JSON's keys."""
        self.current, self.pinned = (
            {int(client): number for client, number in maps[name].items()}
            for name in ("current", "pinned")
        )
