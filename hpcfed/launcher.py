"""`hpcfed run --ranks N`: start mpiexec on this machine."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from hpcfed.errors import UserError


def find_mpiexec() -> str:
    """mpiexec beside this python (the PyPI wheel puts it there), else on the PATH."""
    beside = Path(sys.executable).parent / "mpiexec"
    found = str(beside) if beside.is_file() else shutil.which("mpiexec") or shutil.which("mpirun")
    if found is None:
        raise UserError(
            "No mpiexec found beside this python or on the PATH; install one with "
            "`pip install hpcfed[mpi]`, or load your cluster's MPI module."
        )
    return found


def command(mpiexec: str, ranks: int, program: list[str]) -> tuple[list[str], dict[str, str]]:
    """The mpiexec command line and the variables it wants, by kind of mpiexec.

    Ranks may outnumber cores (a laptop, a test), so binding is off and idle ranks yield.
    """
    version = subprocess.run([mpiexec, "--version"], capture_output=True, text=True).stdout
    if "Open MPI" not in version and "OpenRTE" not in version:
        return [mpiexec, "-n", str(ranks), *program], {}
    flags = ["--oversubscribe", "--bind-to", "none"]
    extra = {"OMPI_MCA_mpi_yield_when_idle": "1"}
    if os.geteuid() == 0:
        for stem in ("OMPI", "PRTE"):
            extra |= {f"{stem}_ALLOW_RUN_AS_ROOT": "1", f"{stem}_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return [mpiexec, *flags, "-n", str(ranks), *program], extra


def start(ranks: int, arguments: list[str]) -> int:
    """Run `hpcfed ARGUMENTS` on `ranks` MPI ranks; returns their exit code."""
    program = [sys.executable, "-m", "hpcfed", *arguments]
    line, extra = command(find_mpiexec(), ranks, program)
    return subprocess.run(line, env={**os.environ, **extra}).returncode
