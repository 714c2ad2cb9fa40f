"""The masked mean on 1, 2, 3 and 4 real ranks."""

import os

import pytest

from tests.support import mpiexec


@pytest.mark.parametrize(("ranks", "ranks_per_client"), [(1, 1), (2, 1), (3, 1), (4, 1), (4, 2)])
def test_against_numpy(ranks, ranks_per_client):
    assert "collective: ok" in mpiexec(ranks, "collective.py", str(ranks_per_client))


@pytest.mark.skipif("HPCFED_BIG" not in os.environ, reason="set HPCFED_BIG=1: needs 10 GB")
def test_more_than_two_gibibytes():
    assert "collective: ok" in mpiexec(2, "collective.py", "1", "big")
