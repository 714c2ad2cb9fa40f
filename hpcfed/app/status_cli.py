"""`hpcfed status`: how far a run, a sweep, a comparison has got."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpcfed.app import compare_file, status, sweep_cli
from hpcfed.app.compare import RUNS, Comparison
from hpcfed.app.status import Standing
from hpcfed.app.sweep import Sweep
from hpcfed.errors import UserError
from hpcfed.storage.paths import CONFIG, MANIFEST, METRICS

_EPILOG = """examples:
  hpcfed status runs/demo                 a run
  hpcfed status runs/my-sweep             all runs in a folder: a sweep's, a comparison's
  hpcfed status my-sweep.yaml             of a description also what was never started
  hpcfed status runs/demo --json          for programs
"""


def add_parser(commands: Any) -> None:
    """Add `status` to argparse's commands."""
    parser = commands.add_parser(
        "status",
        help="how far a run, a sweep or a comparison is, and why one failed",
        description="Rounds, the latest validation score, seconds a round and what is left; what "
        "runs, waits or has failed, and why. Only reads. Exit code 1 if a run has failed or is "
        "damaged.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "what", type=Path, metavar="RUN|SWEEP|COMPARISON",
        help="a run directory, a folder of them, or the YAML file of a sweep or a comparison",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="for programs")


def call(options: argparse.Namespace) -> int:
    """Do what `hpcfed status` was asked. Raises UserError where there is no run."""
    found, unchosen = _find(options.what)
    return status.show(found, unchosen, options.json)


def _find(what: Path) -> tuple[Sequence[Standing], int]:
    """The runs, and how many more wait for values that are not chosen yet."""
    if what.is_file():
        if compare_file.describes_comparison(str(what)):
            comparison = Comparison(compare_file.load(what))
            return _of_comparison(comparison), comparison.unknown()
        if sweep_cli.describes_sweep(str(what)):
            return Sweep.load(what).standings(), 0
        raise UserError(f"{what} describes neither a sweep nor a comparison; give a run directory.")
    if not what.exists():
        raise UserError(f"{what} does not exist; give a run directory, or a folder of them.")
    folder = what.resolve()
    if any((folder / name).is_file() for name in (METRICS, MANIFEST, CONFIG)):
        return status.of_runs(folder.parent, [folder.name]), 0
    found = status.in_folder(folder) or status.in_folder(folder / RUNS, folder / "cells")
    if not found:
        raise UserError(
            f"{what} is no run directory (it has no {METRICS}), nor does it hold one; give what a "
            "run's `output` names, or the YAML file of a sweep or a comparison."
        )
    return found, 0


def _of_comparison(comparison: Comparison) -> list[Standing]:
    """Of all its runs that can be started."""
    known, cells = comparison.known(), {}
    for own in known:
        cell = comparison.cell(own)
        if cell is not None:
            cells[own.name] = status.of_cell(own.name, cell)
    planned = {own.name: own.config.federation.rounds for own in known if own.name not in cells}
    found = status.of_runs(comparison.jobs.folder, planned, planned)
    by_name = cells | {own.name: own for own in found}
    return [by_name[own.name] for own in known]
