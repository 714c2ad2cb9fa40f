"""A federated round on one rank against a plain PyTorch loop over the same batches.

    python benchmarks/round.py [section.key=value ...]

The reference has the same model, adapter, batches and optimizer, and nothing else: no DeepSpeed, no
MPI, no loading and reading of client values. Rounds and reference take turns; the medians and their
ratio are printed, then where the difference goes, then what the start-up was spent on.
"""

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from hpcfed import model
from hpcfed.app.run import quiet
from hpcfed.cluster.collectives import MaskedSum
from hpcfed.cluster.topology import connect_world
from hpcfed.data.batches import Ids
from hpcfed.engine.engine import Engine
from hpcfed.objectives.heads import Classifier
from hpcfed.policies.sampling import sample
from hpcfed.rounds import preflight, setup
from hpcfed.rounds.federation import Federation
from hpcfed.rounds.progress import Progress
from hpcfed.settings.resolve import resolve

ROUNDS = 6


class Clock:
    """Adds up the seconds of wrapped functions by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        """Replace owner.attribute by a timed one."""
        original: Callable[..., Any] = getattr(owner, attribute)

        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(*arguments, **options)
            finally:
                self.seconds[name] += time.perf_counter() - start

        setattr(owner, attribute, timed)


def main() -> None:
    """Measure and print."""
    began = time.monotonic()
    quiet()
    clock = Clock()
    clock.wrap(setup, "connect_slots", "torch.distributed and DeepSpeed's import")
    clock.wrap(Classifier, "encode", "tokenize")
    clock.wrap(model, "prepare", "load the model")
    clock.wrap(setup, "Engine", "DeepSpeed engine")
    with TemporaryDirectory() as folder:
        resolved = resolve(
            "lora-fedavg",
            ["data.root=../shared/datasets", "task.name=trec", "cluster.threads=1",
             f"output={Path(folder) / 'run'}", *sys.argv[1:]],
        )  # fmt: skip
        imported = time.monotonic()
        world = connect_world()
        clock.seconds["MPI"] = time.monotonic() - imported
        checked = preflight.check(resolved, world.size)
        federation = Federation(setup.set_up(checked, world, began))
        startup = dict(clock.seconds)
        plain = Plain(federation)
        parts = Clock()
        parts.wrap(Engine, "load", "load values, fresh optimizer")
        parts.wrap(Engine, "read", "read values")
        parts.wrap(MaskedSum, "add", "add to the sum")
        parts.wrap(MaskedSum, "mean", "exchange")
        silent = Progress(speaks=False)
        federation.round(silent)
        plain.round(0)
        parts.seconds.clear()
        ours, reference = [], []
        for round_number in range(1, ROUNDS + 1):
            ours.append(_seconds(federation.round, silent))
            reference.append(_seconds(plain.round, round_number))
        report(ours, reference, parts, federation)
        print(f"\nstart-up to the first round: {federation.setup.init_seconds:.1f} s")
        startup["imports and the rest"] = federation.setup.init_seconds - sum(startup.values())
        for name, value in sorted(startup.items(), key=lambda item: -item[1]):
            print(f"  {name:<42} {value:6.2f} s")


def report(ours: list[float], reference: list[float], parts: Clock, federation: Federation) -> None:
    """The ratio, and where the difference goes."""
    took, base = statistics.median(ours), statistics.median(reference)
    steps = federation.state.totals.steps / (ROUNDS + 1)
    print(
        f"{federation.setup.config.deepspeed}, {steps:.0f} steps a round\n"
        f"round {took:.3f} s, plain loop {base:.3f} s, ratio {took / base:.3f}"
    )
    extra = (sum(ours) - sum(reference)) / ROUNDS
    named = {name: value / ROUNDS for name, value in parts.seconds.items()}
    named["DeepSpeed engine around forward, backward, step"] = extra - sum(named.values())
    for name, value in named.items():
        print(f"  {name:<48} {value * 1e3:8.1f} ms a round {value / base:+7.1%}")


def _seconds(work: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


class Plain:
    """The reference: local training of a round's clients in plain PyTorch."""

    def __init__(self, federation: Federation) -> None:
        self.federation, self.setup = federation, federation.setup
        config, task = self.setup.config, self.setup.task
        prepared = model.prepare(config, task.labels, self.setup.train_tokens.pad_id, {})
        self.network = prepared.adapted.network.to(self.setup.topology.device).train()
        self.parameters = prepared.adapted.parameters

    def round(self, round_number: int) -> None:
        """Train every sampled client, one after the other."""
        config, clients = self.setup.config, len(self.setup.rows)
        for client in sample(config.seed, round_number, clients, config.federation.per_round):
            self.train(self.federation.local.epochs(client, round_number))

    def train(self, batches: list[Ids]) -> None:
        """One optimizer step per batch."""
        local = self.setup.config.local
        optimizer = torch.optim.AdamW(self.parameters, lr=local.lr, weight_decay=local.weight_decay)
        for batch in batches:
            tokens, device = (
                self.federation.setup.train_tokens,
                self.federation.setup.topology.device,
            )
            labels = torch.from_numpy(tokens.labels[batch]).to(device)
            loss = nn.functional.cross_entropy(
                self.network(**tokens.collate(batch, device)), labels
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.parameters, local.clip)
            optimizer.step()


if __name__ == "__main__":
    main()
