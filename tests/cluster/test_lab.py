"""The cluster leaves nothing behind, also when what started it is killed."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.cluster.lab import why_not
from tests.support import ROOT

PLACES = ("/run", "/run/munge", "/run/sshd", "/var/tmp", "/etc/ssh/ssh_config.d", "/run/netns")


def machine() -> dict[str, object]:
    """What the cluster might change: mounts, network, names, keys, files in fixed places."""
    links = subprocess.run(["ip", "-oneline", "link"], capture_output=True, text=True).stdout
    return {
        "mounts": Path("/proc/self/mounts").read_text(),
        "links": [line.split(": ")[1] for line in links.splitlines()],
        "hosts": Path("/etc/hosts").read_text(),
        "keys": sorted(p.name for p in Path("~root/.ssh").expanduser().glob("*")),
        "hostname": os.uname().nodename,
        **{place: sorted(p.name for p in Path(place).glob("*")) for place in PLACES},
    }


def processes_of(folder: Path) -> list[str]:
    """Command lines of the processes that see the folder's cluster, or were started with it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            seen = str(folder) in (process / "mounts").read_text() + command
        except OSError:
            continue
        if seen and int(process.name) != os.getpid():
            found.append(command)
    return found


@pytest.mark.parametrize("instant", ["starting", "running"])
def test_nothing_is_left(instant):
    """SIGKILL while it starts, and with a job running."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    before = machine()
    # Not tmp_path: the cluster's sockets lie below it, and a socket's path has 107 characters.
    with tempfile.TemporaryDirectory() as place:
        start_and_kill(Path(place), instant)
    assert machine() == before


def start_and_kill(place: Path, instant: str) -> None:
    """A cluster below `place`, killed at an instant; returns when no process of it is left."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.cluster.lab", "srun", "--nodes=2", "sleep", "600"],
        cwd=ROOT, env={**os.environ, "TMPDIR": str(place)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        until = time.monotonic() + 120
        while not (folders := list(place.glob("hpcfed-lab-*"))) or not _there(folders[0], instant):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        assert len(processes_of(folders[0])) > 2
    finally:
        process.kill()
        process.wait()
    until = time.monotonic() + 30
    while processes_of(folders[0]):
        assert time.monotonic() < until, processes_of(folders[0])
        time.sleep(0.2)


def _there(folder: Path, instant: str) -> bool:
    """The cluster's own files are seen from inside only."""
    if instant == "running":
        return (folder / "ready").exists() and any(
            command.startswith("/usr/bin/sleep") for command in processes_of(folder)
        )
    return any("mariadbd" in command or "slurmdbd" in command for command in processes_of(folder))
