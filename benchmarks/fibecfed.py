"""Does FibecFed win? The table against LoRA FedAvg and FibecFed's own ablations.

    python -m benchmarks.fibecfed tune            learning rates, on validation data
    python -m benchmarks.fibecfed run             all cells of the table
    python -m benchmarks.fibecfed clock           both methods alone on the machine, for seconds
    python -m benchmarks.fibecfed table           the table, from the finished cells

Two runs side by side, one thread each, but for `clock`. Finished cells are kept in
benchmarks/fibecfed.jsonl and not run again. Needs the real tasks in ../shared/datasets.
"""

import itertools
from pathlib import Path

from benchmarks.cells import SEEDS, Cell, Method, Study, command_line, variant

MAIN = ("lora-fedavg", "fibecfed")
WITH_DRIFT = (("mr", 0.3), ("trec", 0.3), ("mr", 1.0), ("trec", 1.0))
OTHERS = (("rte", 1.0), ("subj", 1.0))


STUDY = Study(
    Path(__file__).with_suffix(".jsonl"),
    {
        "lora-fedavg": Method("lora-fedavg"),
        "fibecfed": Method("fibecfed"),
        "random order": variant("fibecfed", "curriculum.difficulty=random"),
        "random layers": variant("fibecfed", "layers.score=random"),
        "all layers shared": variant("fibecfed", "layers.score=all"),
        "no sparsity": variant("fibecfed", "sparsity.keep=1"),
    },
    base="lora-fedavg",
    rates=(1e-3, 2e-3, 4e-3, 8e-3),
)


def cells() -> list[Cell]:
    """The runs of the table, the most telling first."""
    ablations = [name for name in STUDY.methods if name not in MAIN]
    return list(
        itertools.chain(
            STUDY.cells(MAIN, WITH_DRIFT, SEEDS),
            STUDY.cells(MAIN, OTHERS, SEEDS),
            STUDY.cells(ablations, WITH_DRIFT, SEEDS),
        )
    )


def table(jobs: int) -> None:
    """Print everything."""
    STUDY.report((*WITH_DRIFT, *OTHERS))
    STUDY.report_seconds(MAIN)


if __name__ == "__main__":
    command_line(
        __doc__,
        {
            "tune": STUDY.tune,
            "run": lambda jobs: STUDY.run(cells(), jobs),
            "clock": lambda jobs: STUDY.run(STUDY.clock_cells(MAIN), 1),
            "table": table,
        },
    )
