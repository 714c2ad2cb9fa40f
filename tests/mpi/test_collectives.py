"""The masked mean on 1, 2, 3 and 4 real ranks."""

import os

import pytest

CASES = "tests.mpi.cases.collective"
SHAPES = [(1, 1), (2, 1), (4, 1), (2, 2)]
# Three slots, whose chunks are never equal, want a world that nothing else uses.
EVERY_SHAPE = [*SHAPES, pytest.param((3, 1), marks=pytest.mark.long)]


KINDS = [(per_value, wire) for per_value in (False, True) for wire in ("float64", "float32")]


@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_against_numpy(worlds, shape):
    """In pieces of 64 values: fewer than one, and several, whose last is not full."""
    for per_value, wire in KINDS:
        for size in (1, 5, 1000):
            worlds.call(
                shape, f"{CASES}:check_mean", size=size, per_value=per_value, wire=wire, chunk=64
            )


@pytest.mark.parametrize(
    ("shape", "per_value", "wire"),
    [((2, 2), True, "float64"),
     *(pytest.param(shape, *kind, marks=pytest.mark.long) for shape in SHAPES for kind in KINDS)],
)  # fmt: skip
def test_in_the_pieces_of_real_runs(worlds, shape, per_value, wire):
    worlds.call(shape, f"{CASES}:check_mean", size=300_001, per_value=per_value, wire=wire)


@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_a_round_without_updates_changes_nothing(worlds, shape):
    worlds.call(shape, f"{CASES}:check_nobody")


@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_the_sum_over_ranks(worlds, shape):
    worlds.call(shape, f"{CASES}:check_sum_over_ranks")


@pytest.mark.long
@pytest.mark.skipif("HPCFED_BIG" not in os.environ, reason="set HPCFED_BIG=1: needs 10 GB")
@pytest.mark.parametrize("shape", [(2, 1)])
def test_more_than_two_gibibytes(worlds, shape):
    worlds.call(shape, f"{CASES}:check_big")
