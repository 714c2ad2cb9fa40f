"""On one host, ranks listen at the loopback and nowhere else."""

import pytest

LOOPBACK = "0100007F"  # 127.0.0.1


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 2)])
def test_ranks_of_one_host_keep_off_the_network(worlds, shape):
    ranks = worlds.call(shape, "tests.mpi.cases.network:listening")
    assert any(ranks), "torch's store, at least"
    assert {address for rank in ranks for address in rank} == {LOOPBACK}
