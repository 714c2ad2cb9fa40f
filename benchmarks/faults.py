"""One client of ten fails, in each way, under each family of methods: the run ends, names it, and
is about as good as without the failure.

    python -m benchmarks.faults [FAMILY ...]

Client 0 fails in every round that draws it. 600 of the built-in questions, MiniLM, ten clients, six
a round, twelve rounds, one rank; accuracy on the test split after the last round. Prints a table,
and exits with 1 if a failure is not named or costs more than LIMIT of accuracy.
"""

import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import hpcfed
from hpcfed.faults import VARIABLE

FAMILIES = ("lora-fedavg", "fibecfed", "fedpeptao", "scaffold", "hetlora")
KINDS = ("exception", "nan", "oom", "slow", "evaluation")
LIMIT = 0.02
ROUNDS = 12
SETTING = [
    "task.name=questions", "task.max_train=600", "task.max_length=48", "federation.clients=10",
    "federation.per_round=6", f"federation.rounds={ROUNDS}", "evaluation.every=4",
    "cluster.threads=1",
]  # fmt: skip


def fault(kind: str) -> str:
    """HPCFED_FAIL_AT for client 0, in every round."""
    phase = " in=evaluate" if kind == "evaluation" else ""
    name = "exception" if kind == "evaluation" else kind
    return "; ".join(f"round={r} client=0 kind={name}{phase}" for r in range(1, ROUNDS + 1))


def run(family: str, folder: Path, text: str) -> hpcfed.Result:
    """A run with these faults."""
    os.environ[VARIABLE] = text
    return hpcfed.run(family, [*SETTING, f"output={folder}"], ranks=1)


def main() -> int:
    """Print a line for each family and kind."""
    bad = 0
    print(f"{'method':<14} {'failure':<11} {'accuracy':>8} {'difference':>10}  failed updates")
    for family in sys.argv[1:] or FAMILIES:
        with TemporaryDirectory() as place:
            whole = run(family, Path(place) / "whole", "").summary
            base = whole["accuracy"]["personal"]
            print(
                f"{family:<14} {'none':<11} {base:8.4f} {'':>10}  {whole['failures']}", flush=True
            )
            for kind in KINDS:
                result = run(family, Path(place) / kind, fault(kind))
                drawn = [0 in line["clients"] for line in result.metrics]
                named = [list(line["failed"]) == ["0"] for line in result.metrics]
                expected = drawn if kind in ("exception", "nan", "oom") else [False] * len(drawn)
                change = result.summary["accuracy"]["personal"] - base
                wrong = named != expected or change < -LIMIT
                bad += wrong
                print(
                    f"{'':<14} {kind:<11} {base + change:8.4f} {change:+10.4f}  "
                    f"{result.summary['failures']} of {sum(drawn)} draws{'  WRONG' * wrong}",
                    flush=True,
                )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
