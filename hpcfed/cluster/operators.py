"""DeepSpeed's compiled operators: built once for a user and machine, by one process at a time.

PyTorch marks a folder in which it compiles by an empty file, `lock`, and whoever finds one waits
until it is gone. A process killed while it compiles leaves it there, and from then on every run
waits for ever. A lock of the kernel's goes with its process: whoever holds ours and finds that the
last holder did not end as it should knows that PyTorch's was left behind.
"""

import contextlib
import fcntl
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

_OURS = "hpcfed.lock"
_THEIRS = "lock"
# A compile takes a minute; another program's lock that is older is told to the user.
_OLD_SECONDS = 300.0


def load() -> None:
    """Load the operator that DeepSpeed's communication wants on this machine, if it wants any,
    and compile it first where that was not done. Not collective."""
    from deepspeed.comm.torch import build_shm_op
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    with alone(root):
        build_shm_op()


@contextlib.contextmanager
def alone(root: Path) -> Iterator[None]:
    """Hold the lock of a folder of compiled operators, and take away what a killed holder left.

    Without locks on its file system, or rights to write there, nothing is held: DeepSpeed will say
    what is wrong.
    """
    with contextlib.ExitStack() as stack:
        stream: TextIO | None = None
        with contextlib.suppress(OSError):
            root.mkdir(parents=True, exist_ok=True)
            stream = stack.enter_context((root / _OURS).open("a+"))
            fcntl.flock(stream, fcntl.LOCK_EX)
        if stream is not None:
            _clear(root, stream)
        yield
        if stream is not None:
            # Where it raises instead, the next holder looks after what may be left.
            stream.truncate(0)


def _clear(root: Path, stream: TextIO) -> None:
    """Remove PyTorch's locks if the last holder of ours was killed; leave a mark of being here."""
    stream.seek(0)
    killed = bool(stream.read())
    for lock in [*root.glob(f"*/{_THEIRS}"), *root.glob(f"*/*/{_THEIRS}")]:
        with contextlib.suppress(OSError):  # who holds it may give it back at this moment
            if killed:
                lock.unlink()
            elif time.time() - lock.stat().st_mtime > _OLD_SECONDS:
                print(
                    f"hpcfed: waiting for {lock}, which says that another program is compiling; "
                    "if none is, remove it.",
                    file=sys.stderr,
                    flush=True,
                )
    if not killed:
        stream.write(f"process {os.getpid()}\n")
        stream.flush()
