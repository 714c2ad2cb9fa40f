"""Does FedPepTAO win? The table against P-tuning v2 with a plain mean, and what the choice of
layers and adaptive optimization add.

    python -m benchmarks.fedpeptao layers          which layers to share, on validation data
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
RATE = 0.04  # what `tune` finds

# Half of the layers by their eigenvalue score is what the rates were tuned with.
EIGENVALUE = ("layers.score=eigenvalue",)
LAYERS = {
    "eigenvalue": EIGENVALUE,
    "eigenvalue, 0.67 of them": (*EIGENVALUE, "layers.keep=0.67"),
    "eigenvalue, warm-up 4": (*EIGENVALUE, "curriculum.warmup=4"),
    "sensitivity": ("layers.score=sensitivity",),
    "last": ("layers.score=last",),
    "last, 0.67 of them": ("layers.score=last", "layers.keep=0.67"),
    "last, warm-up 4": ("layers.score=last", "curriculum.warmup=4"),
    "all layers": ("layers.score=all",),
}

MOMENTUM = ("server.optimizer=momentum", "server.lr=1", "server.lr_decay=1")
SERVERS = {
    "plain mean": ("server.optimizer=mean", "server.control=false"),
    "control": (*MOMENTUM, "server.momentum=0", "server.control=true"),
    "momentum 0.5, control": (*MOMENTUM, "server.momentum=0.5", "server.control=true"),
    "momentum 0.9, control": (*MOMENTUM, "server.momentum=0.9", "server.control=true"),
    "difference, control": (
        "server.optimizer=momentum", "server.gradient=difference", "server.momentum=0.9",
        "server.lr=0.05", "server.lr_decay=0.99", "server.control=true",
    ),
}  # fmt: skip


def changed(*overrides: str) -> Method:
    """FedPepTAO with something else. The clients' learning rate is tuned with a plain mean on the
    server, and then the same for all."""
    return Method("fedpeptao", overrides, rate_of="eigenvalue, plain mean")


STUDY = Study(
    Path(__file__).with_suffix(".jsonl"),
    {
        "p-tuning-v2": Method("p-tuning-v2"),
        "fedpeptao": changed(),
        **{name: changed(*own) for name, own in LAYERS.items()},
        **{f"fedpeptao, {name}": changed(*own) for name, own in SERVERS.items()},
        **{f"eigenvalue, {name}": changed(*EIGENVALUE, *own) for name, own in SERVERS.items()},
        "eigenvalue, plain mean": Method("fedpeptao", (*EIGENVALUE, *SERVERS["plain mean"])),
    },
    base="p-tuning-v2",
    rates=(1e-2, 2e-2, 4e-2, 8e-2),
)


def compare_layers(jobs: int) -> None:
    """Run and print the choices of layers: all on trec, where they differ most, the best again
    with another seed and on mr."""
    columns = [("trec", 1.0, TUNING_SEED), ("trec", 1.0, TUNING_SEED + 1)]
    columns += [(task, alpha, TUNING_SEED) for task, alpha in DRIFT]
    wanted = {
        (name, column): STUDY.cell(name, *column, RATE)
        for column in columns
        for name in LAYERS
        if column == columns[0] or name in ("eigenvalue", "last")
    }
    STUDY.run(wanted.values(), jobs)
    print("\n| layers | trec, seed 42 | trec, seed 43 | mr, 1.0 | mr, 0.3 |\n|---|---|---|---|---|")
    for name in LAYERS:
        print_line(name, [wanted.get((name, column)) for column in columns])


def print_line(name: str, wanted: list[Cell | None]) -> None:
    """Mean validation accuracy of the second half of the rounds, where there is such a cell."""
    done = STUDY.finished()
    found = [find(done, own) if own else None for own in wanted]
    scores = [f"{late_validation(own):.3f}" if own else "" for own in found]
    print(f"| {name} | {' | '.join(scores)} |")


def choose(jobs: int) -> None:
    """Run and print every server on the drifting task, under both choices of layers."""
    columns = [(layers, *task) for layers in ("eigenvalue", "fedpeptao") for task in DRIFT]
    wanted = {
        (name, column): STUDY.cell(f"{column[0]}, {name}", *column[1:], TUNING_SEED, RATE)
        for name in SERVERS
        for column in columns
        if (column[0], name) != ("fedpeptao", "momentum 0.9, control")  # far off with the others
    }
    STUDY.run(wanted.values(), jobs)
    print("\n| server | eigenvalue, mr 1.0 | mr 0.3 | sensitivity, mr 1.0 | mr 0.3 |")
    print("|---|---|---|---|---|")
    for name in SERVERS:
        print_line(name, [wanted.get((name, column)) for column in columns])


def cells() -> list[Cell]:
    """The runs of the table, the most telling first; then what its parts add."""
    return list(
        itertools.chain(
            STUDY.cells(MAIN, (*TASKS, *DRIFT[1:]), SEEDS),
            STUDY.cells(("fedpeptao, plain mean",), DRIFT, SEEDS),
            STUDY.cells(("eigenvalue",), TASKS, SEEDS),
        )
    )


def table(jobs: int) -> None:
    """Print the learning rates, the table, and seconds."""
    STUDY.report((*TASKS, *DRIFT[1:]))
    STUDY.report_seconds(MAIN)


if __name__ == "__main__":
    command_line(
        __doc__,
        {
            "layers": compare_layers,
            "tune": STUDY.tune,
            "choose": choose,
            "run": lambda jobs: STUDY.run(cells(), jobs),
            "clock": lambda jobs: STUDY.run(STUDY.clock_cells(MAIN), 1),
            "table": table,
        },
    )
