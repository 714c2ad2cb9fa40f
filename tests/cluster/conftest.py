"""One cluster for all tests of this folder; where it cannot run they are skipped, with a reason."""

import pytest

from tests.cluster.lab import Lab, why_not
from tests.mpi.variants import write_data


@pytest.fixture(scope="session")
def lab():
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with Lab() as running:
        yield running


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A folder that all hosts see, with the data of the tests."""
    out = tmp_path_factory.mktemp("cluster")
    write_data(out)
    return out
