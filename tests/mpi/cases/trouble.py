"""Cases that fail, for the test of the worlds themselves."""

import time

from hpcfed.cluster.topology import Topology

told: list[str] = []


def remember(topology: Topology, what: str) -> tuple[int, list[str]]:
    """The rank, and what this process was told before."""
    before = list(told)
    told.append(what)
    return topology.world.rank, before


def fail(topology: Topology, rank: int) -> None:
    """One rank fails; the others wait for it in a collective."""
    assert topology.world.rank != rank, f"rank {rank} fails"
    topology.world.comm.Barrier()


def hang(topology: Topology) -> None:
    """It does not end."""
    time.sleep(1000)


def fail_unless_alone(topology: Topology) -> None:
    """What came before gets in the way."""
    assert not told, "not alone"
