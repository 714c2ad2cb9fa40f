"""Does FibecFed win? The table against LoRA FedAvg and FibecFed's own ablations.

    python -m benchmarks.fibecfed tune            learning rates, on validation data
    python -m benchmarks.fibecfed run             all cells of the table
    python -m benchmarks.fibecfed clock           both methods alone on the machine, for seconds
    python -m benchmarks.fibecfed table           the table, from the finished cells

Two runs side by side, one thread each, but for `clock`. Finished cells are kept in
benchmarks/fibecfed.jsonl and not run again. Needs the real tasks in ../shared/datasets.
"""

import argparse
import itertools
from pathlib import Path

from benchmarks.cells import SEEDS, Cell, Method, Study

MAIN = ("lora-fedavg", "fibecfed")
WITH_DRIFT = (("mr", 0.3), ("trec", 0.3), ("mr", 1.0), ("trec", 1.0))
OTHERS = (("rte", 1.0), ("subj", 1.0))


def ablation(*overrides: str) -> Method:
    """FibecFed, changed in one thing, at its learning rate."""
    return Method("fibecfed", overrides, rate_of="fibecfed")


STUDY = Study(
    Path(__file__).with_suffix(".jsonl"),
    {
        "lora-fedavg": Method("lora-fedavg"),
        "fibecfed": Method("fibecfed"),
        "random order": ablation("curriculum.difficulty=random"),
        "random layers": ablation("layers.score=random"),
        "all layers shared": ablation("layers.score=all"),
        "no sparsity": ablation("sparsity.keep=1"),
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


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("tune", "run", "clock", "table"))
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    options = parser.parse_args()
    if options.what == "tune":
        STUDY.run(STUDY.tuning(), options.jobs)
        print(STUDY.best_rates())
    elif options.what == "run":
        STUDY.run(cells(), options.jobs)
    elif options.what == "clock":
        STUDY.run(STUDY.clock_cells(MAIN), 1)
    else:
        STUDY.report((*WITH_DRIFT, *OTHERS))
        STUDY.report_seconds(MAIN)


if __name__ == "__main__":
    main()
