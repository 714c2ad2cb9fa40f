"""Are the rules for the number of shared layers stable?

    python -m benchmarks.lossless [section.key=value ...]

After two rounds of LoRA FedAvg, on trec and on mr, asks 4 clients for the spectrum of their
Hessian, with 3 probe seeds: other clients, other batches, other starts of Lanczos. Prints, by
rule, the number of layers of 6 that each seed comes to, and how many clients showed what the rule
looks for. A rule is stable if the seeds agree to one layer.
Needs the real tasks in ../shared/datasets.
"""

import sys
import time
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Literal

from hpcfed.app.run import quiet
from hpcfed.cluster.topology import connect_slots, connect_world
from hpcfed.rounds import preflight
from hpcfed.rounds.federation import Federation
from hpcfed.rounds.progress import Progress
from hpcfed.rounds.selection import select
from hpcfed.rounds.setup import set_up
from hpcfed.settings.resolve import resolve

COMMON = [
    "data.root=../shared/datasets", "task.max_train=2000", "task.max_length=64",
    "federation.clients=50", "federation.per_round=5", "cluster.threads=1", "local.lr=2e-3",
    "layers.score=random", "layers.keep=lossless", "layers.probe_clients=4",
]  # fmt: skip
WARMUP = 2


def main() -> None:
    """Measure and print."""
    quiet()
    world = connect_world()
    topology = connect_slots(world, resolve("lora-fedavg", [*COMMON, *sys.argv[1:]]).config.cluster)
    for task in ("trec", "mr"):
        with TemporaryDirectory() as folder:
            words = [*COMMON, f"task.name={task}", f"output={folder}/run", *sys.argv[1:]]
            checked = preflight.check(resolve("lora-fedavg", words), world.size)
            federation = Federation(set_up(checked, world, time.monotonic(), topology))
            for _ in range(WARMUP):
                federation.round(Progress(speaks=False))
            for seed in (1, 2, 3):
                ask(federation, task, "eigengap", seed)
            for seed in (1, 2, 3):
                ask(federation, task, "plateau", seed)
            federation.setup.engine.close()


def ask(federation: Federation, task: str, rule: Literal["eigengap", "plateau"], seed: int) -> None:
    """One line: the number of layers that a probe seed comes to."""
    config = federation.setup.config
    began = time.monotonic()
    selection = select(
        replace(config, seed=seed, layers=replace(config.layers, rule=rule)),
        federation.setup.engine,
        federation.setup.rows,
        federation.setup.train_tokens,
        federation.setup.prepared.initial,
        federation.state,
    )
    fractions = [spectrum["share"] for spectrum in selection.record["spectra"].values()]
    gaps = [f"{fraction:.2f}" for fraction in fractions if fraction is not None]
    print(
        f"{task:<5} {rule:<9} probe seed {seed}: {len(selection.chosen)} layers, share "
        f"{selection.record['share']:.2f}; {len(gaps)} of {len(fractions)} clients "
        f"({' '.join(gaps)}); {selection.samples} sample passes, {time.monotonic() - began:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
