"""Cases: hpcfed.run in a process that lives on, or in a world of several ranks."""

import contextlib
import io
import runpy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import hpcfed
from hpcfed.api import _words
from hpcfed.cluster.topology import Topology
from hpcfed.engine.engine import Engine
from tests.mpi.cases.runs import clear
from tests.support import line


def runs(topology: Topology, source: str, runs: list[dict[str, Any]]) -> list[hpcfed.Result]:
    """One after the other, each with its overrides, which name its `output`."""
    results = []
    for overrides in runs:
        clear(topology, Path(overrides["output"]))
        with contextlib.redirect_stdout(io.StringIO()):
            results.append(hpcfed.run(source, overrides))
    return results


def interrupted(
    topology: Topology, source: str, overrides: dict[str, Any], forwards: int
) -> hpcfed.Result:
    """A run that Ctrl-C ends after so many forwards, and that then goes on in the same process; as
    in a notebook, which keeps the exception and all that it refers to."""
    clear(topology, Path(overrides["output"]))
    forward, left = Engine.forward, [forwards]

    def striking(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return forward(*arguments, **options)

    kept = None
    with contextlib.redirect_stdout(io.StringIO()):
        with patch.object(Engine, "forward", striking):
            try:
                hpcfed.run(source, overrides)
            except KeyboardInterrupt as error:
                kept = error
        assert kept is not None
        return hpcfed.run(source, overrides, resume=True)


def refused(topology: Topology, source: str, overrides: dict[str, Any]) -> tuple[str, str]:
    """What a run that cannot be raises, and what it prints besides."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            hpcfed.run(source, overrides)
        except hpcfed.UserError as error:
            return str(error), printed.getvalue()
    raise AssertionError("it was not refused")


def script(
    topology: Topology, file: Path, overrides: dict[str, Any], words: list[str] | None = None
) -> str:
    """A Python file that calls hpcfed.run, where it lies, in this world and with these overrides in
    addition; or its function `main` with these words. What it prints."""
    real, printed = hpcfed.run, io.StringIO()

    def small(source: str, given: Any, *, ranks: int | None, resume: bool) -> hpcfed.Result:
        _, _, *words = line(["run", source, *_words(given), *_words(overrides)])
        return real(source, words, resume=resume)

    with (
        contextlib.chdir(file.parent),
        contextlib.redirect_stdout(printed),
        patch.object(hpcfed, "run", small),
    ):
        names = runpy.run_path(str(file))
        if words is not None:
            names["main"](words)
    return printed.getvalue()
