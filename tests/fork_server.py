"""The fork server of this process, from which tests start ranks; see tests.forks."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
# For processes that tests start: this source before what the environment names already.
PYTHONPATH = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


class ForkServer:
    """A process that has imported what ranks need, from which they are forked."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="forks-"))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> Path:
        """Where it is asked; it is started when it is first needed."""
        path = self._folder / "socket"
        if self._process is None:
            environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.forks", str(path)], cwd=ROOT, env=environment,
                stdin=subprocess.PIPE, start_new_session=True,
            )  # fmt: skip
            while not path.exists():
                if self._process.poll() is not None:
                    raise RuntimeError("the fork server has ended")
                time.sleep(0.05)
        return path

    def end(self) -> None:
        """End it; ranks that still run go on."""
        if self._process is not None:
            self._process.communicate()
        shutil.rmtree(self._folder, ignore_errors=True)


@cache
def fork_server() -> ForkServer | None:
    """The one; None where a fork would not do: a process that has looked for a GPU cannot give it
    to its forks."""
    return None if torch.version.cuda or torch.version.hip else ForkServer()
