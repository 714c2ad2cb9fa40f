"""The worlds that cases run in: what fails is told, replaced, and run again alone."""

import pytest

from tests.worlds import WorldError, Worlds

SHAPE = [(2, 1)]
CASES = "tests.mpi.cases.trouble"


@pytest.fixture(scope="module")
def worlds(common):
    """Worlds that start in a moment."""
    running = Worlds(common / "worlds.lock", bare=True)
    yield running
    running.close()


@pytest.mark.parametrize("shape", SHAPE)
def test_a_case_runs_on_all_ranks_of_one_world(worlds, shape):
    first = worlds.call(shape, f"{CASES}:remember", what="a")
    again = worlds.call(shape, f"{CASES}:remember", what="b")
    assert [rank for rank, _ in first] == [rank for rank, _ in again] == [0, 1]
    if not worlds._fresh:
        assert all(before[-1:] == ["a"] for _, before in again), "not the same processes"


@pytest.mark.parametrize("shape", SHAPE)
def test_a_failure_is_one_when_it_fails_alone_too(worlds, shape, monkeypatch):
    monkeypatch.setattr("tests.worlds.AFTER_FAILURE", 1.0)
    with pytest.raises(WorldError, match=r"ranks \[0\] did not end[\s\S]*rank 1 fails"):
        worlds.call(shape, f"{CASES}:fail", rank=1)
    assert len(worlds.call(shape, f"{CASES}:remember", what="c")) == 2, "it was not replaced"


@pytest.mark.parametrize("shape", SHAPE)
def test_what_only_fails_after_others_is_named(worlds, shape):
    if worlds._fresh:
        pytest.skip("every case is alone")
    worlds.call(shape, f"{CASES}:remember", what="d")
    with pytest.warns(UserWarning, match="passed only alone[\\s\\S]*trouble:remember"):
        worlds.call(shape, f"{CASES}:fail_unless_alone")


@pytest.mark.parametrize("shape", SHAPE)
def test_what_hangs_is_asked_where(worlds, shape):
    with pytest.raises(WorldError, match=r"did not end[\s\S]*in hang"):
        worlds.call(shape, f"{CASES}:hang", seconds=2.0)
