"""Files that are whole or not there, on disk and not only in a cache; and a lock on a folder."""

import contextlib
import fcntl
import json
import os
import socket
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcfed.errors import UserError

if TYPE_CHECKING:
    import torch


def write_bytes(path: Path, content: bytes) -> None:
    """Under another name, forced to disk, then renamed: a reader sees the old file or the new."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def write_json(path: Path, content: Any, indent: int | None = 1) -> None:
    """JSON, as `write_bytes` does."""
    write_bytes(path, (json.dumps(content, indent=indent) + "\n").encode())


def write_tensors(
    path: Path, tensors: dict[str, "torch.Tensor"], metadata: dict[str, str] | None = None
) -> None:
    """A safetensors file, as `write_bytes` does."""
    # Here, because sweeps write JSON only, and torch takes seconds to import.
    from safetensors.torch import save

    whole = {name: value.contiguous() for name, value in tensors.items()}
    write_bytes(path, save(whole, metadata))


def append_line(path: Path, content: Any) -> None:
    """A line of JSON at the end of a file, forced to disk."""
    with path.open("a") as stream:
        stream.write(json.dumps(content) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def make_folder(path: Path) -> None:
    """A folder whose name is on disk too; its parent must be there."""
    if not path.is_dir():
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Force a file that another library has written to disk."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def sync_folder(path: Path) -> None:
    """A rename is on disk when its folder is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Some network file systems cannot, and need not.
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Lock:
    """Keeps a second job out of a folder. The kernel gives it back when the process ends, however
    it ends, also on another node of a shared file system that has locks."""

    def __init__(self, path: Path, job: str, patience: float = 0.0) -> None:
        """Take the lock on the file `path`, waiting at most `patience` seconds for its holder.

        job: what the holder is called, if another wants to know. Raises UserError naming it.
        """
        self._stream = path.open("a+")
        until = time.monotonic() + patience
        while not self._try():
            if time.monotonic() >= until:
                self._stream.seek(0)
                holder = self._stream.read().strip() or "another process"
                self._stream.close()
                raise UserError(
                    f"The run directory {path.parent} is in use by {holder}; wait for it to end, "
                    "or stop it."
                )
            time.sleep(1.0)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self._stream.truncate(0)
        self._stream.write(f"process {os.getpid()} on {socket.gethostname()}{job} since {now}\n")
        self._stream.flush()

    def _try(self) -> bool:
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            print(
                f"hpcfed: this file system has no locks ({error.strerror}); see to it that no "
                "other job uses the same run directory.",
                file=sys.stderr,
            )
        return True

    def release(self) -> None:
        """Give the lock back."""
        self._stream.close()
