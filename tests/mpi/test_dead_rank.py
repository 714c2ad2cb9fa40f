"""A rank that dies, or fails alone, ends the job; it does not leave the others waiting."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpcfed import launcher
from tests.mpi.variants import overrides, write_data
from tests.support import ROOT

DEADLINE = 60.0


def start(tmp_path):
    """A long run on two ranks of one client; returns the process once a round is recorded."""
    write_data(tmp_path)
    words = [
        *overrides(tmp_path, "sgd", "zero2"), "federation.rounds=2000", "evaluation.every=2000",
        "cluster.ranks_per_client=2", f"output={tmp_path}/x",
    ]  # fmt: skip
    line, extra = launcher.command(
        launcher.find_mpiexec(), 2, [sys.executable, "-m", "hpcfed", "run", "lora-fedavg", *words]
    )
    process = subprocess.Popen(
        line, cwd=ROOT, env={**os.environ, **extra}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    waited = time.monotonic()
    metrics = tmp_path / "x" / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() - waited < 120
        time.sleep(0.2)
    return process


def ranks_of(output):
    """Process ids of the ranks that write to this run directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"output={output}".encode() in words and b"-m" in words[:2]:
                found.append(int(entry.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
def test_a_killed_rank_ends_the_job(tmp_path):
    process = start(tmp_path)
    ranks = ranks_of(tmp_path / "x")
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    process.communicate(timeout=DEADLINE)
    assert process.returncode != 0
    assert not ranks_of(tmp_path / "x"), "the other rank is still there"
    assert not (tmp_path / "x" / "summary.json").exists()
