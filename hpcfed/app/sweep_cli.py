"""`hpcfed sweep`, and `hpcfed plan` of a sweep; from Python: hpcfed.app.sweep.Sweep."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hpcfed.app import status
from hpcfed.app.jobs import EXECUTORS
from hpcfed.app.sweep import Sweep
from hpcfed.errors import UserError
from hpcfed.settings.reading import read_file

_EPILOG = """examples:
  hpcfed sweep submit my-sweep.yaml                          as a job array of Slurm
  hpcfed sweep submit my-sweep.yaml --executor local --wait  on this machine
  hpcfed sweep status my-sweep.yaml
  hpcfed plan my-sweep.yaml                                  what each run would take
"""


def add_parser(commands: Any) -> None:
    """Add `sweep` to argparse's commands."""
    parser = commands.add_parser(
        "sweep",
        help="many runs from one description",
        description="Many runs from one description in YAML, each a job with an MPI world of its "
        "own; see docs/sweeps.md.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    submit = actions.add_parser(
        "submit", help="submit the runs that failed or were never submitted, and only those"
    )
    submit.add_argument("--wait", action="store_true", help="until all have ended; then the table")
    show = actions.add_parser(
        "status", help="how far each run is, as `hpcfed status`; exit code 1 if one has failed"
    )
    table = actions.add_parser("table", help="the table alone")
    wait = actions.add_parser("wait", help="until all have ended; then the table")
    line = actions.add_parser(
        "line", help="the words of one run, a NUL byte after each, for slurm/sweep.sh"
    )
    line.add_argument("number", type=int, help="from 0")
    for action in (submit, show, table, wait, line):
        action.add_argument("file", metavar="SWEEP.yaml")
        action.add_argument("--executor", choices=EXECUTORS, help="instead of the file's")
    line.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value",
        help="values that win over the sweep's",
    )  # fmt: skip


def call(options: argparse.Namespace) -> int:
    """Do what `hpcfed sweep` was asked; exit code 1 if a run has failed."""
    sweep = Sweep.load(options.file, options.executor)
    if options.action == "line":
        words = sweep.line(options.number, options.overrides)
        print("".join(f"{word}\0" for word in words), end="")
        return 0
    if options.action == "table":
        print(sweep.table())
        return 0
    if options.action == "submit":
        names = sweep.submit()
        print(f"submitted {len(names)} of {len(sweep.runs)} runs", flush=True)
        if not options.wait:
            return 0
    if options.action == "status":
        return status.show(sweep.standings())
    found = sweep.wait()
    print("\n".join([sweep.table(), *status.reasons(found)]))
    return int(any(own.state == "failed" for own in found))


def describes_sweep(source: str) -> bool:
    """Whether it is the file of a sweep, not of a run."""
    return Path(source).is_file() and "source" in read_file(Path(source))


def plan(options: argparse.Namespace) -> Iterator[str]:
    """The plan of each run, line by line. Raises UserError for the first that cannot be."""
    from hpcfed.app.plan import plan as plan_run

    sweep = Sweep.load(options.source)
    nodes = options.nodes or sweep.nodes
    gpus = options.gpus or sweep.tasks_per_node
    for name in sweep.runs:
        yield f"run {name}"
        try:
            resolved = sweep.resolved(name, options.overrides)
            yield from (f"  {line}" if line else "" for line in
                        plan_run(resolved, nodes, gpus, options.memory))  # fmt: skip
        except UserError as error:
            raise UserError(f"{options.source}, run {name}: {error}") from None
        yield ""
