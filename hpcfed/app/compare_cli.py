"""`hpcfed compare`: start or go on with a comparison, and make its tables."""

import argparse
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from hpcfed.app import compare_file, compare_tables
from hpcfed.app.cells import Cell
from hpcfed.app.compare import Comparison, Progress, Wanted
from hpcfed.app.jobs import Status
from hpcfed.app.status import reasons
from hpcfed.cluster.stop import INTERRUPTED
from hpcfed.errors import UserError
from hpcfed.storage.files import Lock

_EPILOG = """examples:
  hpcfed compare examples/compare.yaml                from nothing to tables, on this machine
  hpcfed compare mine.yaml --local 2                  two runs side by side
  hpcfed compare mine.yaml --slurm                    as job arrays of Slurm; waits for them
  hpcfed compare mine.yaml --table-only               the tables of what is finished
"""


def add_parser(commands: Any) -> None:
    """Add `compare` to argparse's commands."""
    parser = commands.add_parser(
        "compare",
        help="methods x tasks x seeds, tuned alike, as tables",
        description="Run methods on tasks with several seeds, tuned alike on validation data, and "
        "make tables: scores, differences with intervals, and what it takes to a target. What is "
        "finished is never run again: the same command goes on. See docs/comparison-tool.md.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, metavar="SPEC.yaml")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--local", type=int, metavar="N", help="on this machine, N runs side by side (default: 1)"
    )
    where.add_argument("--slurm", action="store_true", help="as job arrays of Slurm")
    parser.add_argument(
        "--table-only", action="store_true", help="start nothing; tables of what is finished"
    )


def call(options: argparse.Namespace) -> int:
    """Do what `hpcfed compare` was asked; exit code 1 if a run has failed."""
    if options.local is not None and options.local < 1:
        raise UserError(f"--local is {options.local}; it must be at least 1.")
    spec = compare_file.load(options.file)
    if options.slurm or options.local is not None:
        spec = replace(spec, executor="slurm" if options.slurm else "local")
    comparison = Comparison(spec, options.local or 1)
    failed: list[Status] = []
    if not options.table_only:
        comparison.check_data()
        spec.folder.mkdir(parents=True, exist_ok=True)
        lock = Lock(spec.folder / "lock", "")
        try:
            _listen()
            failed = comparison.run(_Screen(sys.stdout.isatty()).show)
        except KeyboardInterrupt:
            print(
                "hpcfed: stopped; finished runs are kept, and the others go on from their last "
                "committed round: give the same command again.",
                file=sys.stderr,
            )
            return INTERRUPTED
        finally:
            lock.release()
    print("\n" + compare_tables.write(comparison))
    print(compare_tables.files(spec.folder))
    for line in reasons(failed):
        print(line)
    return 1 if failed else 0


def _listen() -> None:
    """TERM and HUP end it as Ctrl-C does."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)


class _Screen:
    """What a person sees while runs go on: a line for each that is finished, and on a terminal
    one that changes."""

    def __init__(self, live: bool) -> None:
        self._live, self._before = live, ""

    def show(self, now: Progress, finished: list[tuple[Wanted, Cell]]) -> None:
        """Print what has changed."""
        left = "" if now.left is None else f", about {_clock(now.left)} left"
        text = f"{now.done} done, {now.running} running, {now.waiting} waiting, {now.failed} failed"
        for wanted, cell in finished:
            last = cell.score("last") if wanted.final else cell.curve[-1]["score"]
            what = "test" if wanted.final else "validation"
            said = "n/a" if last is None else f"{last:.4f}"
            self._print(f"{wanted.label}: {what} {said}, {cell.spent['total']:.0f} s")
        if self._live:
            print(f"\r\033[K{text}{left}", end="", flush=True)
        elif text != self._before:
            self._print(f"{text}{left}")
        self._before = text

    def _print(self, line: str) -> None:
        print(f"\r\033[K{line}" if self._live else line, flush=True)


def _clock(seconds: float) -> str:
    minutes = int(seconds / 60 + 0.5)
    return f"{minutes // 60}:{minutes % 60:02d} h" if minutes >= 60 else f"{minutes} min"
