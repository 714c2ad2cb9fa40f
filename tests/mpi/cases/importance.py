"""Cases: per-sample Fisher, sensitivity, curvature, and frozen values inside a ZeRO engine."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from hpcfed.cluster.topology import Topology
from hpcfed.engine.probe import (
    eigenvalue_scores,
    fisher_traces,
    gradient,
    hessian_product,
    sensitivity,
)
from hpcfed.settings.config import Config
from hpcfed.settings.resolve import resolve
from tests import models
from tests.mpi.cases.engine import HEADS, LABELS, build, check_moments, some_tokens
from tests.mpi.slow import Plain

ROWS = 8
BATCHES = [np.arange(0, 3), np.arange(3, 7), np.arange(7, 8)]  # ragged; one smaller than ranks
CLOSE = 1e-4
GENERATED = ("idpg", "lpt")  # adapters that have no layers to choose from
Optimizer = Literal["adamw", "adam", "sgd"]


def check(
    topology: Topology, folder: Path, architecture: str, adapter: str, head: str, deepspeed: str,
    spares: bool,
) -> None:  # fmt: skip
    """Everything, for one kind of engine; one client of all ranks of the slot. spares: accumulation
    and gradient checkpointing."""
    targets = ",".join(models.ARCHITECTURES[architecture][3])
    overrides = [
        f"model.name={folder}", f"deepspeed={deepspeed}", f"adapter.targets=[{targets}]",
        "adapter.rank=3", "cluster.threads=1", f"adapter.kind={adapter}",
        f"cluster.ranks_per_client={topology.ranks_per_client}", "adapter.virtual_tokens=3",
        f"model.head={head}", "adapter.reduction=8",
    ]  # fmt: skip
    if spares:
        overrides += ["local.micro_batch=2", "model.gradient_checkpointing=true"]
    config = resolve("lora-fedavg", overrides).config
    plain = Plain(config, LABELS, HEADS[head])
    torch.manual_seed(1)
    # Values large enough that the loss is curved, small enough that attention is not saturated.
    vector = torch.randn(plain.layout.size) * (1.0 if adapter in ("prefix", "prompt") else 0.1)
    check_fisher(config, plain, vector, topology)
    check_curvature(config, plain, vector, topology)
    if adapter not in ("prompt", *GENERATED):
        check_frozen(config, plain, vector, topology)
    if adapter == "lora" and head == "classifier":
        # What surrounds a step knows nothing of adapters and heads.
        check_corrections(config, plain, vector, topology)
        # AdamW's and SGD's are kept in cases/engine.py.
        local = replace(config.local, optimizer="adam", lr=1e-2, weight_decay=0.01)
        engine = build(config, local, topology)
        check_moments(engine, vector)
        engine.close()
    if "zero3" in deepspeed:
        check_silence(config, vector, topology)


def close(found: object, wanted: object, what: str) -> None:
    """Equal to 1e-4, relative to each value or, where that is tiny, to the largest."""
    one, two = np.asarray(found, dtype=float), np.asarray(wanted, dtype=float)
    error = np.abs(one - two) / np.maximum(np.abs(two), 1e-4 * np.abs(two).max())
    assert error.max() <= CLOSE, f"{what}: {error.max():.1e} off"


def check_fisher(config: Config, plain: Plain, vector: torch.Tensor, topology: Topology) -> None:
    """Own pass, training pass and sensitivity equal loops over single samples."""
    tokens = some_tokens(ROWS, 11)
    exactly = Plain(config, LABELS, HEADS[config.model.head]).double()
    gradients = torch.stack(
        [exactly.gradient(vector.double(), row, tokens) for row in range(len(tokens))]
    )
    wanted = gradients.double().square().sum(1).numpy()

    engine = build(config, replace(config.local, lr=0.0, optimizer="sgd"), topology)
    engine.load(vector)
    close(fisher_traces(engine, BATCHES, tokens), wanted, "Fisher, own pass")
    rows = np.array([2, 7, 4])
    if config.adapter.kind not in GENERATED:  # which have no layers to choose from
        direct = np.mean([plain.sensitivity(vector, int(row), tokens) for row in rows], axis=0)
        close(sensitivity(engine, rows, tokens), direct, "sensitivity")
        direct = plain.alike(vector, rows, tokens)
        close(eigenvalue_scores(engine, rows, tokens), direct, "eigenvalue score")

    trained = engine.train([*BATCHES[1:], *BATCHES], tokens, 0, observe=True)
    close(trained.fisher, wanted, "Fisher in training")
    everyone = np.arange(len(tokens))
    close(trained.losses, plain.losses(vector, everyone, tokens).detach().numpy(), "losses")
    counts = torch.tensor([1.0] * 3 + [2.0] * 5)  # batches 1 and 2 were trained on twice
    mean = (gradients.square() * counts[:, None]).sum(0) / counts.sum()
    neurons = [
        mean[e.values].reshape(e.shape).movedim(e.neuron_axis, 0).flatten(1).sum(1)
        for e in plain.layout.entries
        if e.neuron_axis is not None
    ]
    close(trained.neurons, torch.cat(neurons), "Fisher of neurons")
    engine.close()


def check_silence(config: Config, vector: torch.Tensor, topology: Topology) -> None:
    """Training has the same bits whether or not probes came between."""
    tokens = some_tokens(ROWS, 11)
    results = []
    for probes in (False, True):
        engine = build(config, replace(config.local, lr=0.1, optimizer="sgd"), topology)
        engine.load(vector)
        engine.train(BATCHES, tokens, 0)
        if probes:
            fisher_traces(engine, BATCHES, tokens)
            sensitivity(engine, BATCHES[0], tokens)
        engine.train(BATCHES, tokens, 0)
        results.append(engine.read())
        engine.close()
    assert not torch.equal(results[0], vector)
    assert torch.equal(*results), "a probe changed what training does"


def check_curvature(config: Config, plain: Plain, vector: torch.Tensor, topology: Topology) -> None:
    """Hessian products equal differences of gradients of a float64 copy of the model: of the fourth
    order, so that steps may be long, since some architectures take their norms in float32."""
    tokens = some_tokens(ROWS, 11)
    batch = BATCHES[1]
    torch.manual_seed(3)
    direction = torch.randint(0, 2, (plain.layout.size,)).double() * 2 - 1
    exactly = Plain(config, LABELS, HEADS[config.model.head]).double()

    def slope(at: torch.Tensor) -> torch.Tensor:
        leaf = at.clone().requires_grad_()
        return torch.autograd.grad(exactly.losses(leaf, batch, tokens).mean(), leaf)[0]

    h = 1e-3
    ahead, back, far_ahead, far_back = (
        slope(vector.double() + steps * h * direction) for steps in (1, -1, 2, -2)
    )
    wanted = (8 * (ahead - back) - (far_ahead - far_back)) / (12 * h)
    engine = build(config, config.local, topology)
    engine.load(vector)
    error = float((gradient(engine, batch, tokens) - slope(vector.double())).norm())
    assert error <= 1e-5 * float(slope(vector.double()).norm()), f"gradient: {error:.1e} off"
    found = hessian_product(engine, vector, direction, batch, tokens)
    error = float((found - wanted).norm() / wanted.norm())
    exact = engine.stage < 2 and not engine.checkpointing
    print(f"Hessian product, {'exact' if exact else 'differences'}: {error:.1e}", flush=True)
    assert error <= (1e-5 if exact else 1e-3), f"Hessian product: {error:.1e} off"
    engine.close()


def check_frozen(config: Config, plain: Plain, vector: torch.Tensor, topology: Topology) -> None:
    """Frozen values keep their bits through real steps; the others equal those of a plain loop in
    which the frozen ones are not parameters; the next client is free again."""
    tokens = some_tokens(ROWS, 11)
    rng = np.random.default_rng(2)
    layout = plain.layout
    trainable = layout.expand(torch.from_numpy(rng.random(layout.neurons[-1].stop) < 0.5))
    kinds: list[tuple[Optimizer, float, float, float, float]] = [
        ("sgd", 0.5, 0.05, 0.1, 1e-5),
        ("adamw", 1e-2, 0.05, 0.1, 1e-3),
    ]
    for name, lr, decay, clip, tolerance in kinds:
        local = replace(config.local, optimizer=name, lr=lr, weight_decay=decay, clip=clip)
        engine = build(config, local, topology)
        engine.load(vector)
        engine.train(BATCHES, tokens, 0)  # another client before
        engine.load(vector, trainable)
        engine.train(BATCHES, tokens, 0)
        found = engine.read()
        assert torch.equal(found[~trainable], vector[~trainable]), f"{name}: a frozen value moved"
        kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name]
        make = partial(kind, lr=lr, weight_decay=decay)
        wanted = plain.train(vector, trainable, BATCHES, tokens, make, clip)
        moved, reference = (found - vector)[trainable], (wanted - vector)[trainable]
        error = float((moved - reference).norm() / reference.norm())
        assert error <= tolerance, f"{name}: {error:.1e} from the plain loop"
        engine.load(vector)
        engine.train(BATCHES, tokens, 0)
        free = engine.read()
        assert float((free != vector).float()[~trainable].mean()) > 0.9, "still frozen"
        engine.close()


def check_corrections(
    config: Config, plain: Plain, vector: torch.Tensor, topology: Topology
) -> None:
    """Proximal term and control variate move the values as in a plain loop that adds them to the
    clipped gradient, also under a mask; the mean gradient is that of the loop, without them."""
    tokens = some_tokens(ROWS, 11)
    rng = np.random.default_rng(4)
    layout, lr, clip, mu = plain.layout, 0.1, 0.2, 0.7
    chosen = rng.random(layout.neurons[-1].stop) < 0.5
    chosen[0] = True
    trainable = layout.expand(torch.from_numpy(chosen))
    control = torch.from_numpy(rng.normal(0, 0.05, layout.size)).float()
    local = replace(config.local, optimizer="sgd", lr=lr, clip=clip, proximal=mu)
    engine = build(config, local, topology)
    for mask in (None, trainable):
        engine.load(vector, mask, control=control)
        engine.train(BATCHES, tokens, 0)
        found = engine.read()
        mean = engine.mean_gradient(len(BATCHES))
        kept = torch.ones(layout.size) if mask is None else mask.float()
        wanted, gradients = vector.clone(), []
        for batch in BATCHES:
            leaf = wanted.clone().requires_grad_()
            (slope,) = torch.autograd.grad(plain.losses(leaf, batch, tokens).mean(), leaf)
            slope = slope * kept
            slope = slope * min(1.0, clip / float(slope.norm()))
            gradients.append(slope)
            wanted = wanted - lr * kept * (slope + control + mu * (wanted - vector))
        wanted_mean = torch.stack(gradients).mean(0)
        error = float((mean - wanted_mean).norm() / wanted_mean.norm())
        assert error <= 1e-5, f"mean gradient: {error:.1e} off"
        error = float((found - wanted).norm() / (wanted - vector).norm())
        assert error <= 1e-5, f"corrected steps: {error:.1e} from the plain loop"
        if mask is not None:
            assert torch.equal(found[~mask], vector[~mask])
    engine.load(vector)
    engine.train(BATCHES, tokens, 0)
    without = engine.read()
    assert not torch.allclose(without, found), "the control vector outlived its client"
    engine.close()
