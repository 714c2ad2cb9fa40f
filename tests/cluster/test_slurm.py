"""The scripts in slurm/ on two hosts."""

import json

import pytest

from tests.cluster.methods import METHODS, RANKS, words
from tests.same import assert_same
from tests.support import mpiexec

BOTH = ("--nodes=2", "--ntasks-per-node=2")


@pytest.fixture(scope="module")
def local(shared):
    """method -> its run under mpiexec on this machine, which nothing disturbs."""
    for method in METHODS:
        mpiexec(RANKS, "hpcfed", "run", method, *words(method, shared, f"{method}-local"))
    return {method: shared / f"{method}-local" for method in METHODS}


def lives(out):
    return json.loads((out / "run.json").read_text())["lives"]


@pytest.mark.parametrize("method", METHODS)
def test_sbatch_across_both_hosts(lab, shared, local, method):
    """One rank a client: the same bits as under a local mpiexec."""
    name, log = f"{method}-sbatch", shared / f"{method}.out"
    job = lab.submit(*BOTH, f"--output={log}", f"slurm/{method}.sh", *words(method, shared, name))
    assert lab.ends(job, log=log) == "COMPLETED", log.read_text()
    assert_same(shared / name, local[method])
    assert lives(shared / name)[0]["hosts"] == {"n1": 2, "n2": 2}
