"""Sweeps on the command line; from Python: hpcfed.app.sweep.Sweep.

python launch/sweep.py submit launch/experiments/small.yaml
python launch/sweep.py submit launch/experiments/small.yaml --executor local --wait
python launch/sweep.py status launch/experiments/small.yaml
"""

import argparse
import sys

from hpcfed.app.sweep import EXECUTORS, Status, Sweep
from hpcfed.errors import UserError


def build_parser() -> argparse.ArgumentParser:
    """The parser of this program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    submit = commands.add_parser(
        "submit", help="submit the runs that failed or were never submitted, and only those"
    )
    submit.add_argument("--wait", action="store_true", help="until all have ended; then the table")
    status = commands.add_parser("status", help="what has become of each run, and the results")
    line = commands.add_parser("line", help="the words of one run, for slurm/sweep.sh")
    line.add_argument("number", type=int, help="from 0")
    for command in (submit, status, line):
        command.add_argument("file", metavar="SWEEP.yaml")
        command.add_argument("--executor", choices=EXECUTORS, help="instead of the file's")
    return parser


def show(sweep: Sweep, found: list[Status]) -> bool:
    """Print the table, and the last words of what failed; whether nothing has failed."""
    print(sweep.table())
    for own in found:
        if own.state == "failed":
            print(f"\n{own.name} failed (job {own.job}, {own.rounds} rounds committed):")
            print("\n".join(f"    {line}" for line in own.log or ["it left no words"]))
    return all(own.state != "failed" for own in found)


def main() -> int:
    """Exit code 0 if nothing has failed."""
    options = build_parser().parse_args()
    try:
        sweep = Sweep.load(options.file, options.executor)
        if options.command == "line":
            print("\n".join(sweep.line(options.number)))
            return 0
        if options.command == "submit":
            names = sweep.submit()
            print(f"submitted {len(names)} of {len(sweep.runs)} runs")
            if not options.wait:
                return 0
            sweep.wait()
        return 0 if show(sweep, sweep.status()) else 1
    except UserError as error:
        print(f"sweep: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
