"""Does FedPepTAO win? The table against P-tuning v2 with a plain mean, and what adaptive
optimization adds to the same layers.

    python -m benchmarks.fedpeptao tune            learning rates, on validation data
    python -m benchmarks.fedpeptao choose          the server, at that rate, on validation data
    python -m benchmarks.fedpeptao run             all cells of the table
    python -m benchmarks.fedpeptao clock           both methods alone on the machine, for seconds
    python -m benchmarks.fedpeptao table           the table, from the finished cells

Two runs side by side, one thread each, but for `clock`. Finished cells are kept in
benchmarks/fedpeptao.jsonl and not run again. Needs the real tasks in ../shared/datasets.
"""

import itertools
from pathlib import Path

from benchmarks.cells import (
    SEEDS,
    TUNING_SEED,
    Cell,
    Method,
    Study,
    command_line,
    find,
    late_validation,
)

MAIN = ("p-tuning-v2", "fedpeptao")
TASKS = (("trec", 1.0), ("mr", 1.0), ("rte", 1.0))
DRIFT = (("mr", 1.0), ("mr", 0.3))
PLAIN = ("server.optimizer=mean", "server.control=false")
MOMENTUM = ("server.optimizer=momentum", "server.lr=1", "server.lr_decay=1")
PUBLISHED = (
    "server.optimizer=momentum", "server.gradient=difference", "server.momentum=0.9",
    "server.lr=0.05", "server.lr_decay=0.99",
)  # fmt: skip


def server(*overrides: str) -> Method:
    """FedPepTAO with another server. The clients' learning rate is tuned with a plain mean on the
    server, and then the same for all."""
    return Method("fedpeptao", overrides, rate_of="plain mean")


STUDY = Study(
    Path(__file__).with_suffix(".jsonl"),
    {
        "p-tuning-v2": Method("p-tuning-v2"),
        "fedpeptao": server(),
        "plain mean": Method("fedpeptao", PLAIN),
        "momentum 0.9, control": server(*MOMENTUM, "server.momentum=0.9", "server.control=true"),
        "momentum 0.5, control": server(*MOMENTUM, "server.momentum=0.5", "server.control=true"),
        "control": server(*MOMENTUM, "server.momentum=0", "server.control=true"),
        "difference, control": server(*PUBLISHED, "server.control=true"),
    },
    base="p-tuning-v2",
    rates=(1e-2, 2e-2, 4e-2, 8e-2),
)
ADAPTIVE = [name for name in STUDY.methods if name not in MAIN]


def choices() -> list[Cell]:
    """Every server on the drifting task, with the tuning seed."""
    return list(STUDY.cells(ADAPTIVE, DRIFT, [TUNING_SEED]))


def report_choices() -> None:
    """Mean validation accuracy of the second half of the rounds."""
    done, rates = STUDY.finished(), STUDY.best_rates()
    print("\n| server | mr, 1.0 | mr, 0.3 |\n|---|---|---|")
    for method in ADAPTIVE:
        scores = []
        for task, alpha in DRIFT:
            own = find(done, STUDY.cell(method, task, alpha, TUNING_SEED, rates[method]))
            scores.append(f"{late_validation(own):.3f}" if own else "")
        print(f"| {method} | {scores[0]} | {scores[1]} |")


def cells() -> list[Cell]:
    """The runs of the table, the most telling first; then the same layers with a plain mean."""
    return list(
        itertools.chain(
            STUDY.cells(MAIN, TASKS, SEEDS),
            STUDY.cells(("plain mean",), DRIFT, SEEDS),
            STUDY.cells(MAIN, DRIFT[1:], SEEDS),
        )
    )


def choose(jobs: int) -> None:
    """Run and print the servers."""
    STUDY.run(choices(), jobs)
    report_choices()


def table(jobs: int) -> None:
    """Print everything."""
    STUDY.report((*TASKS, *DRIFT[1:]))
    report_choices()
    STUDY.report_seconds(MAIN)


if __name__ == "__main__":
    command_line(
        __doc__,
        {
            "tune": STUDY.tune,
            "choose": choose,
            "run": lambda jobs: STUDY.run(cells(), jobs),
            "clock": lambda jobs: STUDY.run(STUDY.clock_cells(MAIN), 1),
            "table": table,
        },
    )
