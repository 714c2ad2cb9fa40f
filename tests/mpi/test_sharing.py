"""What travels, what stays, what is frozen, and who has which rank equal a plain loop."""

from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hpcfed.settings.resolve import resolve
from tests.mpi.reference_sharing import Loop
from tests.mpi.variants import COMMON
from tests.pairwise import pairwise, product

# Method -> its preset, and what the comparison sets in it. Clients have 1, 1, 2 and 5 batches; with
# this decay some clients give up a rank in a round, and others do not.
METHODS: dict[str, tuple[str, list[str]]] = {
    "ffa": ("ffa-lora", []),
    "fedsa": ("fedsa-lora", ["local.epochs=3"]),  # A moves little
    "rolora": ("rolora", []),
    "fedalt": ("fedalt", ["curriculum.warmup=1", "layers.score=last", "layers.keep=0.5"]),
    "nothing": ("local-only", []),
    "hetlora": ("hetlora", ["updates.rank_decay=0.1"]),
}

FACTORS: dict[str, list[Any]] = {
    "shape": [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)],
    "method": list(METHODS),
    "stage": ["zero0", "zero1", "zero2", "zero3", "offload"],
}
# As in test_fedpeptao: one slot, several, and several ranks of one.
FEW = pairwise({**FACTORS, "shape": [(1, 1), (2, 1), (1, 2)]})
MANY = [case for case in product(FACTORS) if case not in FEW]


def overrides(data, method, stage="zero0"):
    return [
        *COMMON, "local.optimizer=sgd", "local.lr=0.2", "local.clip=1.0", "local.batch_size=4",
        "federation.rounds=4", *METHODS[method][1], f"model.name={data}/bert-classifier",
        f"data.root={data}", f"deepspeed=ds_configs/{stage}.json",
    ]  # fmt: skip


def federate(worlds, shape, folder, data, method, *extra, stage="zero0", lost=()):
    """The server's values at last, and the run's directory."""
    runs = {"run": [*overrides(data, method, stage), *extra]}
    found = worlds.call(
        shape, "tests.mpi.cases.runs:federate", folder=folder, runs=runs,
        preset=METHODS[method][0], lost=lost,
    )  # fmt: skip
    return found[0]["run"]["values"], folder / "run"


@pytest.fixture
def reference(data, once):
    """reference(method): what the plain loop came to."""

    def get(method, lost=()):
        def make():
            config = resolve(METHODS[method][0], overrides(data, method)).config
            return Loop(method, config, lost).run()

        return once(f"sharing-{method}{lost or ''}", make)

    return get


def compare(values, run, loop):
    """A run with the plain loop: the server's values, the clients' own, their ranks."""
    moved = (loop.values != loop.initial).numpy()
    assert np.array_equal(values[~moved], loop.initial.numpy()[~moved]), "has moved, and must not"
    for block in loop.layout.blocks:
        span = loop.layout.span(block)
        if moved[span].any():
            check(loop, values, loop.values, span, block)
    files = {int(p.parent.name): p for p in run.glob("clients/*/personal-*")}
    assert files.keys() == loop.personal.keys()
    for k, wanted in loop.personal.items():
        own = loop.initial.float().clone()
        own[loop.home] = load_file(files[k])["values"]
        for block in loop.layout.blocks:
            span = loop.layout.span(block)
            if loop.home[span].any():
                at_home = torch.where(loop.home, wanted, loop.initial)
                check(loop, own.numpy(), at_home, span, f"{block} of client {k}")
    for k, rank in loop.ranks.items() if loop.config.updates.transforms else ():
        assert int(memo(run, k)["rank"]) == rank


def memo(run, client):
    """What transforms remember of a client."""
    (file,) = run.glob(f"clients/{client:06d}/updates-*.safetensors")
    return load_file(file)


def check(loop, values, wanted, span, what):
    """||D - Dref|| / ||Dref||, D the way from the initial values."""
    start = loop.initial.numpy()[span]
    moved, reference = values[span] - start, wanted.numpy()[span] - start
    assert np.linalg.norm(reference) > 1e-3, f"{what} did not move: the test shows nothing"
    difference = np.linalg.norm(moved - reference) / np.linalg.norm(reference)
    assert difference <= 1e-5, f"{what}: {difference:.2e}"


@pytest.mark.parametrize(("shape", "method", "stage"), FEW)
def test_equals_the_plain_loop(worlds, reference, data, tmp_path, shape, method, stage):
    values, run = federate(worlds, shape, tmp_path, data, method, stage=stage)
    compare(values, run, reference(method))


@pytest.mark.long
@pytest.mark.parametrize(("shape", "method", "stage"), MANY)
def test_equals_the_plain_loop_in_full(worlds, reference, data, tmp_path, shape, method, stage):
    values, run = federate(worlds, shape, tmp_path, data, method, stage=stage)
    compare(values, run, reference(method))
