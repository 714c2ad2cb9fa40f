"""A cluster for the tests of each worker; where none can run they are skipped, with a reason."""

import fcntl

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
def shared(common):
    """A folder that all hosts, and all workers, see, with the data and the model of the tests."""
    out = common / "cluster"
    with (common / "cluster.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            out.mkdir()
            methods.prepare(out)
            methods.Undisturbed(out).begin()
    return out


@pytest.fixture(scope="session")
def undisturbed(shared):
    """Name -> the run that others must equal."""
    return methods.Undisturbed(shared)
