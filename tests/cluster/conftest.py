"""One cluster for all tests of this folder; where it cannot run they are skipped, with a reason."""

import pytest

from tests.cluster import methods
from tests.cluster.lab import Lab, why_not


@pytest.fixture(scope="session")
def lab():
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with Lab() as running:
        yield running


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A folder that all hosts see, with the data and the model of the tests."""
    out = tmp_path_factory.mktemp("cluster")
    methods.prepare(out)
    return out


@pytest.fixture(scope="session")
def undisturbed(shared):
    """Name -> the run that others must equal."""
    return methods.references(shared)
