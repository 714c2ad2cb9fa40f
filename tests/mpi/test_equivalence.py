"""Federated training equals a plain PyTorch loop, for every shape of the world and ZeRO stage.

Relative difference per block after 3 rounds, D = value - initial value:
||D - Dref|| / ||Dref|| <= 1e-5 with SGD and 1e-3 with AdamW. Never loosen it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from hpcfed import model
from hpcfed.data import sources
from hpcfed.settings.resolve import resolve
from tests.mpi.reference import federated_average
from tests.mpi.variants import STAGES, VARIANTS, overrides
from tests.pairwise import each, others

SHAPES = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)]
FACTORS: dict[str, Sequence[Any]] = {
    "shape": SHAPES, "variant": [v for v in VARIANTS if v != "dropout"], "stage": STAGES,
}  # fmt: skip
FEW = each(FACTORS)
MANY = others(FACTORS, FEW)


def small(out, variant, stage="zero0"):
    return [*overrides(out, variant, stage), f"model.name={out}/bert-classifier"]


def federate(worlds, shape, out, tmp_path, variant, stage="zero0"):
    """Final values of a run."""
    name = f"{variant}-{stage}"
    runs = {name: small(out, variant, stage)}
    found = worlds.call(shape, "tests.mpi.cases.runs:federate", folder=tmp_path, runs=runs)
    return found[0][name]["values"]


def reference(config):
    """(layout, initial values, reference values, batch sizes)."""
    layout = model.prepare(config, sources.load(config).labels, 0, {}).adapted.layout
    return (layout, *federated_average(config))


def compare(values, variant, found):
    """Block by block."""
    layout, initial, wanted, _ = found
    tolerance = 1e-3 if "adamw" in variant else 1e-5
    for block in layout.blocks:
        span = layout.span(block)
        start = initial.numpy()[span]
        moved, reference = values[span] - start, wanted.numpy()[span] - start
        assert np.linalg.norm(reference) > 1e-3, f"block {block} did not move: it shows nothing"
        difference = np.linalg.norm(moved - reference) / np.linalg.norm(reference)
        assert difference <= tolerance, f"block {block}: {difference:.2e} > {tolerance:g}"


def check(worlds, once, data, tmp_path, shape, variant, stage):
    config = resolve("lora-fedavg", small(data, variant)).config
    found = once(f"average-{variant}", lambda: reference(config))
    compare(federate(worlds, shape, data, tmp_path, variant, stage), variant, found)


@pytest.mark.parametrize(("shape", "variant", "stage"), FEW)
def test_equals_plain_loop(worlds, once, data, tmp_path, shape, variant, stage):
    check(worlds, once, data, tmp_path, shape, variant, stage)


@pytest.mark.long
@pytest.mark.parametrize(("shape", "variant", "stage"), MANY)
def test_equals_plain_loop_in_full(worlds, once, data, tmp_path, shape, variant, stage):
    check(worlds, once, data, tmp_path, shape, variant, stage)


@pytest.mark.parametrize("shape", [(2, 1)])
def test_a_real_model(worlds, once, data, tmp_path, shape):
    """MiniLM, with AdamW, at ZeRO-2."""
    words = overrides(data, "adamw", "zero2")
    found = once("average-minilm", lambda: reference(resolve("lora-fedavg", words).config))
    runs = worlds.call(
        shape, "tests.mpi.cases.runs:federate", folder=tmp_path, runs={"minilm": words}
    )
    compare(runs[0]["minilm"]["values"], "adamw", found)


def test_the_batches_are_ragged(once, data):
    config = resolve("lora-fedavg", small(data, "sgd")).config
    *_, sizes = once("average-sgd", lambda: reference(config))
    assert 1 in sizes, "a last batch smaller than the ranks of a client"
    assert len(set(sizes)) >= 4 and max(sizes) == 8


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (4, 1)])
@pytest.mark.parametrize(
    "variant", [pytest.param("sgd", marks=pytest.mark.long), "adamw", "dropout"]
)
def test_bit_identical_for_any_number_of_slots(worlds, once, data, tmp_path, shape, variant):
    """Each compares with the first of the three that ran."""
    values = federate(worlds, shape, data, tmp_path, variant)
    first = once(f"bits-{variant}", lambda: (shape, values))
    assert np.array_equal(values, first[1]), f"{shape} differs from {first[0]}"
