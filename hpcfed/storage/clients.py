"""What clients keep, as files: clients/000012/personal-00003.safetensors, and a history.

Each file of tensors is sealed by itself: its header says whose it is, and has a digest of that and
of the tensors. Files of other names are not ours, and are left alone.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file

from hpcfed.state import KINDS, ClientFiles
from hpcfed.storage.checks import DamageError, as_object, read_bytes
from hpcfed.storage.files import append_line, make_folder, write_bytes, write_tensors
from hpcfed.storage.paths import HISTORY

_FOLDER = re.compile(r"\d{6,}")
_STATE = re.compile(rf"({'|'.join(KINDS)})-\d{{5,}}\.safetensors(\.tmp)?|history\.jsonl\.tmp")


class ClientFolders:
    """The folder clients/ of a run. run: the run's name, before anything is saved or checked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run = ""

    def save(
        self, kind: str, client: int, round_number: int, tensors: dict[str, torch.Tensor]
    ) -> None:
        """What a client keeps after a round."""
        self._make(client)
        label = self._label(kind, client, round_number)
        seal = {**label, "sha256": _digest(label, tensors)}
        write_tensors(self.file(kind, client, round_number), tensors, seal)

    def load(self, kind: str, client: int, round_number: int) -> dict[str, torch.Tensor]:
        """What a client kept after a round."""
        return load_file(self.file(kind, client, round_number))

    def drop(self, kind: str, client: int, round_number: int) -> None:
        """Remove a state that nothing refers to any more."""
        self.file(kind, client, round_number).unlink(missing_ok=True)

    def note(self, client: int, record: dict[str, Any]) -> None:
        """Append a round to a client's own history; by one rank of the slot that ran it."""
        self._make(client)
        append_line(self._folder(client) / HISTORY, record)

    def check(self, clients: Mapping[str, ClientFiles]) -> None:
        """Read each file that a commit refers to, and the histories.

        Raises DamageError for the first that is not as it was written.
        """
        for kind, client, round_number in sorted(_needed(clients)):
            self._check(kind, client, round_number)
        for folder in self._folders():
            if not folder.is_dir():
                raise DamageError(folder, "is a file, where a client's folder should be")
            if (folder / HISTORY).exists():
                for _ in _lines(folder / HISTORY):
                    pass

    def clean(self, clients: Mapping[str, ClientFiles], rounds: int) -> None:
        """Remove what neither this commit of `rounds` rounds nor the one before refers to."""
        replaced = {(kind, *pair) for kind, own in clients.items() for pair in own.replaced}
        used = {self.file(*key) for key in _needed(clients) | replaced}
        for folder in self._folders():
            for file in list(folder.iterdir()):
                if file.name == HISTORY:
                    _cut(file, rounds)
                elif _STATE.fullmatch(file.name) and file.is_file() and file not in used:
                    file.unlink()

    def file(self, kind: str, client: int, round_number: int) -> Path:
        """Where a state lies."""
        return self._folder(client) / f"{kind}-{round_number:05d}.safetensors"

    def _folder(self, client: int) -> Path:
        return self.path / f"{client:06d}"

    def _folders(self) -> list[Path]:
        if not self.path.is_dir():
            return []
        return sorted(own for own in self.path.iterdir() if _FOLDER.fullmatch(own.name))

    def _make(self, client: int) -> None:
        make_folder(self.path)
        make_folder(self._folder(client))

    def _label(self, kind: str, client: int, round_number: int) -> dict[str, str]:
        return {"run": self.run, "kind": kind, "client": str(client), "round": str(round_number)}

    def _check(self, kind: str, client: int, round_number: int) -> None:
        file = self.file(kind, client, round_number)
        content = read_bytes(file)
        try:
            tensors = load(content)
            size = int.from_bytes(content[:8], "little")
            header = as_object(content[8 : 8 + size]).get("__metadata__", {})
        except (SafetensorError, ValueError) as error:
            raise DamageError(file, f"is damaged ({error})") from None
        label = self._label(kind, client, round_number)
        told = {name: header.get(name) for name in label}
        if told != label and None not in told.values():
            raise DamageError(file, "belongs to another client, round or run")
        if header.get("sha256") != _digest(label, tensors):
            raise DamageError(file, "is damaged (its content is not what its checksum says)")


def _needed(clients: Mapping[str, ClientFiles]) -> set[tuple[str, int, int]]:
    """(kind, client, round) of the files that a commit refers to."""
    return {
        (kind, *pair)
        for kind, files in clients.items()
        for table in (files.current, files.pinned)
        for pair in table.items()
    }


def _digest(label: dict[str, str], tensors: dict[str, torch.Tensor]) -> str:
    found = hashlib.sha256(json.dumps(label).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        raw: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        found.update(raw)
    return found.hexdigest()


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """(round, line) of each whole line of a history. Raises DamageError for what is no round."""
    *lines, _ = read_bytes(file).split(b"\n")
    before = 0
    for number, line in enumerate(lines, 1):
        found = None
        with contextlib.suppress(ValueError):
            found = as_object(line).get("round")
        if type(found) is not int or found <= before:
            raise DamageError(file, f"is damaged in line {number}")
        before = found
        yield found, line


def _cut(file: Path, rounds: int) -> None:
    """Remove what comes after so many rounds, a line that was cut off too."""
    kept = b"".join(line + b"\n" for found, line in _lines(file) if found <= rounds)
    if len(kept) < file.stat().st_size:
        write_bytes(file, kept)
