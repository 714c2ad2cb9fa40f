"""A run's secret key: a file of its owner's alone, beside the run directory and not in it.

    runs/.keys/0a1b2c3d4e5f6071     of the run with this name in its manifest

So what is copied, shown or published of a run directory does not hold it; and a run that goes on
finds it, where it lies beside the run directory still.
"""

import os
from pathlib import Path

from hpcfed.errors import UserError
from hpcfed.storage.files import sync_folder, writing

FOLDER = ".keys"


def place(run_directory: Path, run: str) -> Path:
    """Of the key of a run. run: its name in the manifest."""
    return run_directory.absolute().parent / FOLDER / run


def write(file: Path, key: bytes) -> None:
    """A new file. Raises DiskError."""
    with writing(file):
        file.parent.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(key)
            stream.flush()
            os.fsync(stream.fileno())
        sync_folder(file.parent)


def read(file: Path, run_directory: Path) -> bytes:
    """Raises UserError if it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(
            f"{run_directory} cannot be resumed: its secret key {file} cannot be read "
            f"({error.strerror}); put it back there, readable for you alone, or give another run "
            "directory with output=..."
        ) from None
