"""Federated training equals a plain PyTorch loop, for every shape of the world and ZeRO stage.

Relative difference per block after 3 rounds, D = value - initial value:
||D - Dref|| / ||Dref|| <= 1e-5 with SGD and 1e-3 with AdamW. Never loosen it.
"""

from pathlib import Path

import numpy as np
import pytest

from hpcfed import model
from hpcfed.data import sources
from hpcfed.resolve import resolve
from tests.mpi.reference import federated_average
from tests.mpi.variants import STAGES, VARIANTS, overrides
from tests.mpi.worlds import run_worlds

# (slots, ranks per client) -> the runs made in that world; every stage in each kind of world.
SGD = [f"sgd:{stage}" for stage in STAGES]
ADAMW = [f"adamw:{stage}" for stage in ("zero0", "zero1", "zero2", "offload")]
EXTRAS = [
    "decay:zero0", "decay:zero2", "accumulate:zero0", "accumulate:zero1", "accumulate:zero2",
    "accumulate-adamw:zero2", "checkpointing:zero0", "accumulate-checkpointing:zero3",
]  # fmt: skip
BITS_ONLY = ["dropout:zero0"]  # compared between numbers of slots, not with the reference
WORLDS = {
    (1, 1): [*SGD, "adamw:zero0", "adamw:zero2", "adamw:offload", "decay:zero0",
             "accumulate:zero1", "checkpointing:zero0", "accumulate-checkpointing:zero3"],
    (2, 1): ["sgd:zero0", "adamw:zero0", "sgd:zero2", "accumulate:zero3"],
    (4, 1): ["sgd:zero0", "adamw:zero0", "sgd:zero1", "sgd:zero3"],
    (1, 2): SGD + ADAMW + EXTRAS,
    (2, 2): ["sgd:zero0", "adamw:zero1", "accumulate:zero2", "adamw:zero3"],
}  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """World -> folder with the final values of its runs."""
    worlds = {
        world: [*runs, *(BITS_ONLY if world[1] == 1 else [])] for world, runs in WORLDS.items()
    }
    return run_worlds(tmp_path_factory, worlds, lambda out, run: overrides(out, *run.split(":")))


@pytest.fixture(scope="module")
def references(results):
    """Variant -> (layout, initial values, reference values, batch sizes)."""
    folder = next(iter(results.values()))
    found = {}
    for name in VARIANTS.keys() - {"dropout"}:
        config = resolve("lora-fedavg", overrides(folder, name)).config
        labels = sources.load(config).labels
        layout = model.prepare(config, labels, 0, {}).adapted.layout
        found[name] = (layout, *federated_average(config))
    return found


@pytest.mark.parametrize(
    ("world", "run"), [(world, run) for world, runs in WORLDS.items() for run in runs], ids=str
)
def test_equals_plain_loop(results, references, world, run):
    name, stage = run.split(":")
    layout, initial, reference, _ = references[name]
    values = np.load(Path(results[world]) / f"{name}-{stage}.npy")
    tolerance = 1e-3 if "adamw" in name else 1e-5
    for block in layout.blocks:
        span = layout.span(block)
        start = initial.numpy()[span]
        moved, wanted = values[span] - start, reference.numpy()[span] - start
        assert np.linalg.norm(wanted) > 1e-3, f"block {block} did not move: the test shows nothing"
        difference = np.linalg.norm(moved - wanted) / np.linalg.norm(wanted)
        assert difference <= tolerance, f"block {block}: {difference:.2e} > {tolerance:g}"


def test_the_batches_are_ragged(references):
    sizes = references["sgd"][3]
    assert 1 in sizes, "a last batch smaller than the ranks of a client"
    assert len(set(sizes)) >= 4 and max(sizes) == 8


@pytest.mark.parametrize("run", ["sgd-zero0", "adamw-zero0", "dropout-zero0"])
def test_bit_identical_for_any_number_of_slots(results, run):
    one, two, four = (np.load(results[slots, 1] / f"{run}.npy") for slots in (1, 2, 4))
    assert np.array_equal(one, two)
    assert np.array_equal(one, four)
