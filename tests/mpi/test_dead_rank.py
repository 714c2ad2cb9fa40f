"""A rank that dies, or fails alone, ends the job; it does not leave the others waiting."""

import subprocess
from pathlib import Path

import pytest

from tests.mpi.variants import overrides
from tests.support import mpiexec

SECONDS = 240  # without a rank that dies the run would take hours


def processes_of(output):
    """Command lines of the processes that write to this run directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"output={output}".encode() in words:
                found.append(words)
    return found


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
def test_a_killed_rank_ends_the_job(data, tmp_path):
    """One of two ranks of a ZeRO-2 client kills itself in the second round."""
    words = [
        *overrides(data, "sgd", "zero2"), f"model.name={data}/bert-classifier",
        "federation.rounds=100000", "cluster.ranks_per_client=2", f"output={tmp_path}/x",
    ]  # fmt: skip
    line = ["forward", "12", "1", "SIGKILL", "run", "lora-fedavg", *words]
    try:
        with pytest.raises(AssertionError, match="exit code"):
            mpiexec(2, "interrupt.py", *line, timeout=SECONDS, real=True)
    except subprocess.TimeoutExpired:
        pytest.fail(f"the job was still there after {SECONDS} s: {processes_of(tmp_path / 'x')}")
    assert not processes_of(tmp_path / "x"), "the other rank is still there"
    assert (tmp_path / "x" / "metrics.jsonl").read_text(), "it died before its first round"
    assert not (tmp_path / "x" / "summary.json").exists()
