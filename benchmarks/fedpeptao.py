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
        **{name: changed(*overrides) for name, overrides in LAYERS.items()},
        **{f"fedpeptao, {name}": changed(*overrides) for name, overrides in SERVERS.items()},
        **{
            f"eigenvalue, {name}": changed(*EIGENVALUE, *overrides)
            for name, overrides in SERVERS.items()
        },
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
        name: [
            (name, *column) if column == columns[0] or name in ("eigenvalue", "last") else None
            for column in columns
        ]
        for name in LAYERS
    }
    validate(wanted, "layers | trec, seed 42 | trec, seed 43 | mr, 1.0 | mr, 0.3", jobs)


def choose(jobs: int) -> None:
    """Run and print every server on the drifting task, under both choices of layers."""
    wanted = {
        name: [
            (f"{layers}, {name}", *task, TUNING_SEED)
            # Far off with the eigenvalue's layers; not run with the others.
            if (layers, name) != ("fedpeptao", "momentum 0.9, control")
            else None
            for layers in ("eigenvalue", "fedpeptao")
            for task in DRIFT
        ]
        for name in SERVERS
    }
    validate(wanted, "server | eigenvalue, mr 1.0 | mr 0.3 | sensitivity, mr 1.0 | mr 0.3", jobs)


def validate(
    wanted: dict[str, list[tuple[str, str, float, int] | None]], titles: str, jobs: int
) -> None:
    """Run and print lines of a table: of each method, task, alpha and seed the mean validation
    accuracy of the second half of the rounds, at the tuned rate."""
    rates = STUDY.best_rates()
    rows = {
        name: [STUDY.cell(*key, rates[key[0]]) if key else None for key in row]
        for name, row in wanted.items()
    }
    STUDY.run([cell for row in rows.values() for cell in row if cell], jobs)
    done = STUDY.finished()
    print(f"\n| {titles} |\n|{'---|' * (titles.count('|') + 1)}")
    for name, row in rows.items():
        results = [find(done, cell) if cell else None for cell in row]
        scores = [f"{late_validation(cell):.3f}" if cell else "" for cell in results]
        print(f"| {name} | {' | '.join(scores)} |")


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
