"""What per-sample Fisher information costs: its own pass, and taken along in training.

    python -m benchmarks.fisher

MiniLM, LoRA rank 8 on query and value, batches of 8 rows, ZeRO-0, one rank, one thread. References:
a plain PyTorch forward and backward over the same batches; the engine's training without Fisher;
and the loop over single samples that per-sample gradients take without hooks.
"""

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from hpcfed import model
from hpcfed.app.run import quiet
from hpcfed.cluster.topology import connect_slots, connect_world
from hpcfed.data.batches import Tokens
from hpcfed.engine.engine import Engine
from hpcfed.engine.probe import fisher_traces
from hpcfed.settings import deepspeed_config
from hpcfed.settings.resolve import resolve

BATCH, BATCHES, REPEATS = 8, 6, 7


def some_tokens(length: int) -> Tokens:
    """Rows of random ids, all of this length."""
    rows = BATCH * BATCHES
    ids = np.random.default_rng(0).integers(1000, 20000, rows * length).astype(np.int32)
    offsets = np.arange(rows + 1) * length
    return Tokens(ids, None, offsets, np.arange(rows) % 2, 0)


def timed(work: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each, in turns, so that all meet the same disturbances."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(REPEATS + 1):
        for name, do in work.items():
            began = time.perf_counter()
            do()
            if repeat:  # the first is warm-up
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in seconds.items()}


def main() -> None:
    """Print the ratios at three lengths."""
    quiet()
    config = resolve("lora-fedavg", ["model.dropout=0", "cluster.threads=1"]).config
    topology = connect_slots(connect_world(), config.cluster)
    settings = deepspeed_config.load(config)
    engine = Engine(
        model.prepare(config, ("a", "b"), 0, settings), config.local, settings, topology
    )
    plain = model.prepare(config, ("a", "b"), 0, {})
    engine.load(plain.initial)
    print("seconds for 48 samples; own pass / plain, with / without Fisher in training")
    for length in (12, 32, 64):
        measure(length, engine, plain)
    engine.close()


def measure(length: int, engine: Engine, plain: model.Prepared) -> None:
    """One line: seconds and ratios for rows of this many tokens."""
    tokens = some_tokens(length)
    batches = [np.arange(i, i + BATCH) for i in range(0, BATCH * BATCHES, BATCH)]
    parameters = plain.adapted.parameters

    def forward_backward(size: int) -> None:
        for start in range(0, BATCH * BATCHES, size):
            rows = np.arange(start, start + size)
            logits = plain.adapted.network(**tokens.collate(rows, engine.topology.device))
            labels = torch.from_numpy(tokens.labels[rows]).to(engine.topology.device)
            nn.functional.cross_entropy(logits, labels).backward()  # type: ignore[no-untyped-call]
            if size == 1:  # what the loop is for
                sum(p.grad.square().sum() for p in parameters if p.grad is not None)
            for parameter in parameters:
                parameter.grad = None

    seconds = timed(
        {
            "plain": lambda: forward_backward(BATCH),
            "own pass": lambda: fisher_traces(engine, batches, tokens),
            "training": lambda: engine.train(batches, tokens, 0),
            "with Fisher": lambda: engine.train(batches, tokens, 0, observe=True),
            "loop": lambda: forward_backward(1),
        }
    )
    print(
        f"{length:>3} tokens  "
        + "  ".join(f"{name} {value:.3f}" for name, value in seconds.items())
        + f"  |  own pass {seconds['own pass'] / seconds['plain']:.3f} x plain"
        f"  training {seconds['with Fisher'] / seconds['training']:.3f} x"
        f"  loop {seconds['loop'] / seconds['plain']:.2f} x plain",
        flush=True,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
