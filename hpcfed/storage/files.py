"""Files that are whole or not there, on disk and not only in a cache; and a lock on a folder."""

import contextlib
import errno
import fcntl
import json
import math
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcfed.errors import DiskError, UserError

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What fails inside because of the disk becomes a DiskError about `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            disk = path.absolute().parent
            while not os.path.ismount(disk):
                disk = disk.parent
            raise DiskError(
                f"The disk is full ({reason}): {path} cannot be written; make room on {disk}"
            ) from None
        raise DiskError(f"{path} cannot be written ({reason}); see to it that it can") from None


def write_bytes(path: Path, content: bytes) -> None:
    """Under another name, forced to disk, then renamed: a reader sees the old file or the new.
    Raises DiskError, as all that writes here does."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        try:
            with temporary.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()  # what is written of it only takes room
            raise
        temporary.replace(path)
        sync_folder(path.parent)


def as_json(content: Any, indent: int | None = None) -> bytes:
    """JSON, with a new line at its end; JSON has no numbers that are not finite, so they are
    null."""
    try:
        text = json.dumps(content, indent=indent, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(content), indent=indent)
    return (text + "\n").encode()


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    return [_finite(item) for item in content] if isinstance(content, (list, tuple)) else content


def write_json(path: Path, content: Any, indent: int | None = 1) -> None:
    """JSON, as `write_bytes` does."""
    write_bytes(path, as_json(content, indent))


def write_tensors(
    path: Path, tensors: dict[str, "torch.Tensor"], metadata: dict[str, str] | None = None
) -> bytes:
    """A safetensors file, as `write_bytes` does; its content."""
    # Here, because sweeps write JSON only, and torch takes seconds to import.
    from safetensors.torch import save

    content = save({name: value.contiguous() for name, value in tensors.items()}, metadata)
    write_bytes(path, content)
    return content


def append_line(path: Path, content: Any) -> bytes:
    """A line of JSON at the end of a file, forced to disk; the line."""
    line = as_json(content)
    with writing(path), path.open("ab") as stream:
        stream.write(line)
        stream.flush()
        os.fsync(stream.fileno())
    return line


def make_folder(path: Path) -> None:
    """A folder whose name is on disk too; its parent must be there."""
    if not path.is_dir():
        with writing(path):
            path.mkdir(exist_ok=True)
            sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Force a file that another library has written to disk."""
    with writing(path), path.open("rb") as stream:
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
        with writing(path):
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
        try:
            with writing(path):
                self._stream.truncate(0)
                holder = f"process {os.getpid()} on {socket.gethostname()}{job} since {now}\n"
                self._stream.write(holder)
                self._stream.flush()
        except DiskError:
            self.release()
            raise

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
        """Give the lock back; the file names nobody then."""
        with contextlib.suppress(OSError, ValueError):  # it may be closed
            self._stream.truncate(0)
        with contextlib.suppress(OSError):
            self._stream.close()


def holder(path: Path) -> tuple[bool | None, str]:
    """Whether the process lives that a lock names, and its name; the lock is not touched.

    None: it cannot be seen from here, as on another host, or there is no lock.
    """
    try:
        named = path.read_text(errors="replace").strip()
    except OSError:
        return None, ""
    if not named:
        return False, ""  # it was given back
    match = re.match(r"process (\d+) on (\S+)", named)
    if not match or match[2] != socket.gethostname():
        return None, named
    # The number may be another process's by now: the one meant has the file open.
    try:
        open_files = list(Path(f"/proc/{match[1]}/fd").iterdir())
    except FileNotFoundError:
        return False, named
    except OSError:  # another user's
        return None, named
    for file in open_files:
        with contextlib.suppress(OSError):
            if file.samefile(path):
                return True, named
    return False, named
