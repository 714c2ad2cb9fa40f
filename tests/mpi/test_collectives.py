"""The masked mean on 1, 2, 3 and 4 real ranks."""

import os

import pytest

CASES = "tests.mpi.cases.collective"
SHAPES = [(1, 1), (2, 1), (4, 1), (2, 2)]
# Three slots, whose chunks are never equal, want a world that nothing else uses.
EVERY_SHAPE = [*SHAPES, pytest.param((3, 1), marks=pytest.mark.long)]


@pytest.mark.parametrize("wire", ["float64", "float32"])
@pytest.mark.parametrize("per_value", [False, True])
@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_against_numpy(worlds, shape, per_value, wire):
    for size in (1, 5, 1000, 300_001):
        worlds.call(shape, f"{CASES}:check_mean", size=size, per_value=per_value, wire=wire)


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
