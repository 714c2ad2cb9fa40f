"""Cases that fail, for the test of the worlds themselves; in worlds of MPI alone."""

import time

from hpcfed.cluster.topology import World

told: list[str] = []


def remember(world: World, what: str) -> tuple[int, list[str]]:
    """The rank, and what this process was told before."""
    before = list(told)
    told.append(what)
    return world.rank, before


def fail(world: World, rank: int) -> None:
    """One rank fails; the others wait for it in a collective."""
    assert world.rank != rank, f"rank {rank} fails"
    world.comm.Barrier()


def hang(world: World) -> None:
    """It does not end."""
    time.sleep(1000)


def fail_unless_alone(world: World) -> None:
    """What came before gets in the way."""
    assert not told, "not alone"
