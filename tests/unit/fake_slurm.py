"""slurm/*.sh with commands that note what they were called with, in place of Slurm's."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support import ROOT

# comment: the job's comment; log: calls; STEP_CODE: how the step ends.
_COMMANDS = {
    "squeue": 'cat "$FAKE/comment" 2>/dev/null || echo "(null)"',
    "scontrol": """
        case $1 in
            update) printf '%s\\n' "${3#Comment=}" >"$FAKE/comment" ;;
            show) echo "$3" ;;
        esac""",
    "sinfo": "echo idle",
    "srun": """
        [[ $1 != --mpi=list ]] || { printf '\\t%s\\n' none pmi2 pmix; exit; }
        [[ " $* " != *" --overlap "* ]] || exit 0
        exit "${STEP_CODE:-0}" """,
    "mpirun": 'exit "${STEP_CODE:-0}"',
    "sleep": "",
}


class FakeSlurm:
    """Slurm's commands in a folder, for jobs of two nodes of 8 cores."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        (folder / "log").touch()
        for name, body in _COMMANDS.items():
            self.add(name, body)

    def add(self, name: str, body: str) -> None:
        """Another command; each call is a line of the log, its words apart by |."""
        file = self.folder / "bin" / name
        note = f"""(IFS='|'; printf '{name}|%s\\n' "$*") >>"$FAKE/log\""""
        file.write_text(f"#!/usr/bin/env bash\n{note}\n{body}\n")
        file.chmod(0o755)

    @property
    def comment(self) -> str:
        """The job's comment."""
        return (self.folder / "comment").read_text().rstrip("\n")

    @comment.setter
    def comment(self, text: str) -> None:
        (self.folder / "comment").write_text(f"{text}\n")

    def calls(self, name: str) -> list[list[str]]:
        """The words of each call of a command."""
        lines = (self.folder / "log").read_text().splitlines()
        return [line.split("|")[1:] for line in lines if line.startswith(f"{name}|")]

    def step(self) -> list[str]:
        """The words of the one step that ran hpcfed."""
        (found,) = (call for call in [*self.calls("srun"), *self.calls("mpirun")] if "run" in call)
        return found

    def run(self, script: str, *words: str, cwd: Path = ROOT, **variables: str) -> tuple[int, str]:
        """The exit code of a script of slurm/ as a job that was submitted in cwd, and its log."""
        place = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        own = {
            "FAKE": str(self.folder), "PATH": place, "PYTHONPATH": str(ROOT),
            "PYTHON": sys.executable, "SLURM_SUBMIT_DIR": str(cwd), "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "8",
        }  # fmt: skip
        done = subprocess.run(
            ["bash", script, *words], cwd=cwd, env={**os.environ, **own, **variables},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr
