"""Does a difficulty order samples as the final model's loss would, and from which round on?

    python -m benchmarks.difficulty [section.key=value ...]

Runs LoRA FedAvg; before some of its rounds takes every difficulty of every training row at the
values of that moment: Fisher trace and loss by a pass of their own, and the Fisher trace that a
local epoch of training from there sees. Prints the rank correlation (Spearman) with the rows' loss
under the final model: within each client, which is what a curriculum orders, weighted by rows, and
over all rows.
Needs the real tasks in ../shared/datasets, and scipy.
"""

import sys
import time
from tempfile import TemporaryDirectory

import numpy as np
from scipy.stats import spearmanr

from hpcfed import registry
from hpcfed.app.run import quiet
from hpcfed.cluster.topology import connect_world
from hpcfed.data.batches import Floats, form_batches
from hpcfed.engine.probe import fisher_traces
from hpcfed.rng import derive, generator
from hpcfed.rounds import preflight
from hpcfed.rounds.federation import Federation
from hpcfed.rounds.progress import Progress
from hpcfed.rounds.setup import set_up
from hpcfed.settings.resolve import resolve

MOMENTS = (0, 1, 2, 4, 8, 16)  # rounds done before scoring
COMMON = [
    "data.root=../shared/datasets", "task.name=trec", "task.max_train=2000", "task.max_length=64",
    "federation.clients=50", "federation.per_round=5", "federation.rounds=20", "cluster.threads=1",
    "local.lr=2e-3", "evaluation.every=20",
]  # fmt: skip


def main() -> None:
    """Measure and print."""
    quiet()
    with TemporaryDirectory() as folder:
        resolved = resolve("lora-fedavg", [*COMMON, f"output={folder}/run", *sys.argv[1:]])
        world = connect_world()
        federation = Federation(
            set_up(preflight.check(resolved, world.size), world, time.monotonic())
        )
        tokens = federation.setup.train_tokens
        train = [rows.train for rows in federation.setup.rows]
        orders: dict[str, dict[int, Floats]] = {"fisher": {}, "in training": {}, "loss": {}}
        for round_number in range(max(federation.setup.config.federation.rounds, 1 + max(MOMENTS))):
            if round_number in MOMENTS:
                orders["fisher"][round_number], orders["loss"][round_number] = score(federation)
                orders["in training"][round_number] = in_training(federation)
            federation.round(Progress(speaks=False))
        _, final = score(federation)
        fixed = {kind: np.zeros(len(tokens)) for kind in ("length", "rarity", "random")}
        for rows in train:
            for kind in ("length", "rarity"):
                fixed[kind][rows] = registry.DIFFICULTIES[kind](rows, tokens)
            fixed["random"][rows] = generator(0, "order").random(len(rows))
        name = federation.setup.config.task.name
        print(f"{name}: rank correlation with the final loss, within clients (over all rows)")
        print("rounds before  " + "".join(f"{n:>16}" for n in MOMENTS))
        for kind, taken in orders.items():
            print(f"{kind:<15}" + "".join(f"{both(taken[n], final, train):>16}" for n in MOMENTS))
        for kind, scores in fixed.items():
            print(f"{kind:<15}" + f"{both(scores, final, train):>16}" * len(MOMENTS))
        federation.setup.engine.close()


def score(federation: Federation) -> tuple[Floats, Floats]:
    """(rows,) Fisher trace and loss of every training row at the shared values."""
    engine, tokens = federation.setup.engine, federation.setup.train_tokens
    fisher, losses = np.zeros(len(tokens)), np.zeros(len(tokens))
    engine.load(federation.state.values)
    for k, rows in enumerate(federation.setup.rows):
        batches = form_batches(rows.train, tokens.lengths, 8, generator(0, "batches", k))
        fisher += fisher_traces(engine, batches, tokens)
        losses += engine.predict(batches, tokens)[0][-1]
    return fisher, losses


def in_training(federation: Federation) -> Floats:
    """(rows,) Fisher trace of every training row while its client trains for an epoch."""
    engine, tokens = federation.setup.engine, federation.setup.train_tokens
    fisher = np.zeros(len(tokens))
    for k, rows in enumerate(federation.setup.rows):
        batches = form_batches(rows.train, tokens.lengths, 8, generator(0, "batches", k))
        engine.load(federation.state.values)
        fisher += engine.train(batches, tokens, derive(0, "dropout", k), observe=True).fisher
    return fisher


def both(scores: Floats, final: Floats, train: list[np.ndarray]) -> str:
    """Within clients, and over all rows."""
    within, weights = [], []
    for rows in train:
        if len(rows) > 2 and np.ptp(scores[rows]) > 0:
            within.append(spearmanr(scores[rows], final[rows]).statistic)
            weights.append(len(rows))
    everyone = np.concatenate(train)
    overall = spearmanr(scores[everyone], final[everyone]).statistic
    return f"{np.average(within, weights=weights):.2f} ({overall:.2f})"


if __name__ == "__main__":
    main()
