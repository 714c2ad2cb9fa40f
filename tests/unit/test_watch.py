"""When a job in which nothing moves is ended, and who is named."""

import json
import os
import time

import pytest

from hpcfed.cluster import watch
from hpcfed.cluster.watch import Stillness, Watch, Watched

LIMIT = 100.0
HERE = ("the exchange of round 2", True, 7)


def states(*moves):
    """Of other ranks that do not wait."""
    return {rank: f"training, {count}" for rank, count in enumerate(moves, 1)}


def test_over_after_the_limit_and_not_before():
    still = Stillness(LIMIT, HERE, 0.0)
    assert not still.suspicious(49.0) and still.suspicious(50.0)
    assert not still.over(states(3), 50.0)
    assert not still.over(states(3), 99.0)
    assert still.over(states(3), 100.0)


def test_a_move_of_its_own_begins_anew():
    still = Stillness(LIMIT, HERE, 0.0)
    assert not still.moved(HERE, 60.0)
    still.over(states(3), 60.0)
    assert still.moved((*HERE[:2], 8), 90.0)
    assert not still.suspicious(139.0)
    assert not still.over(states(3), 150.0)
    assert still.over(states(3), 200.0)


def test_somebody_elses_move_gives_half_of_the_limit():
    """A slot that trains long, and says so at each step, is waited for."""
    still = Stillness(LIMIT, HERE, 0.0)
    for clock in range(50, 1000, 40):
        assert not still.over(states(clock), float(clock))
    last = float(clock)
    assert not still.over(states(clock), last + 49.0)
    assert still.over(states(clock), last + 50.0)


class Store:
    """A store as torch's, in this process."""

    def __init__(self):
        self.kept = {}

    def set(self, key, value):
        self.kept[key] = value.encode()

    def get(self, key):
        return self.kept[key]

    def check(self, keys):
        return all(key in self.kept for key in keys)

    def compare_set(self, key, expected, value):
        if self.kept.get(key, b"") == expected.encode():
            self.kept[key] = value.encode()
        return self.kept[key]


class Ended(BaseException):
    """In place of the process's end."""


@pytest.fixture
def said(monkeypatch):
    """What is said before the end."""
    lines: list[str] = []

    def end(code):
        raise Ended(code)

    monkeypatch.setattr(watch, "_say", lines.append)
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return lines


def test_the_missing_are_named_by_one(said):
    store = Store()
    ranks = [Watch(rank, 3) for rank in range(3)]
    ranks[0].doing("the exchange of round 2")
    ranks[0].waits(True)
    ranks[1].doing("training client 5 in round 2")
    for one in (0, 1):  # rank 2 has never been heard of
        ranks[one]._publish(store, ranks[one]._state())
    missing = ranks[0]._others(store)
    assert sorted(missing) == [1, 2]
    for one in (0, 2):
        with pytest.raises(Ended):
            ranks[one]._end(store, missing)
    (line,) = said
    assert "rank 1 on " in line and "training client 5 in round 2" in line
    assert "rank 2 does not answer" in line and "rank 0" not in line and "--resume" in line


def test_a_store_that_is_gone(said):
    class Gone(Store):
        def fail(self, *arguments):
            raise RuntimeError("connection reset")

        check = compare_set = set = fail

    one = Watch(1, 2)
    one._publish(Gone(), one._state())
    assert one._others(Gone()) == {0: ""}
    with pytest.raises(Ended):
        one._end(Gone(), {0: ""})
    assert "rank 0 does not answer" in said[0]


def test_waits_of_a_communicator_are_seen():
    class Comm:
        rank = 4

        def allgather(self, value):
            seen.append(one._state())
            return [value]

        def Free(self):  # noqa: N802
            seen.append(one._state())

    seen: list[watch.State] = []
    one = Watch(0, 1)
    comm = Watched(Comm(), one)
    assert comm.rank == 4 and comm.allgather(3) == [3]
    comm.Free()
    assert [waiting for _, waiting, _ in seen] == [True, False]
    before = one._state()[2]
    with pytest.raises(TypeError):
        comm.allgather()
    what, waiting, moves = one._state()
    assert not waiting and moves > before
    assert json.dumps([what, waiting, moves])
