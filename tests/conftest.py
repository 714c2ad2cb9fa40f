"""Quiet third parties; one thread, so that references have the same bits as the ranks; which tests
run together, and for how long."""

import os
import re
import signal
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Importing submitit sets logging up anew; absl's handler, which another library has brought, then
# closes the file to which pytest sends stderr, and every later test fails.
os.environ.setdefault("SUBMITIT_LOG_LEVEL", "NOCONFIG")

import pytest
import torch
import transformers
from xdist.scheduler import LoadScopeScheduling

from hpcfed.app.run import quiet
from tests.fork_server import fork_server
from tests.support import DATASETS
from tests.worlds import Worlds

quiet()
torch.set_num_threads(1)
# A shell that starts these tests in the background has one ignored, nohup the other, for all that
# they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
transformers.utils.logging.disable_progress_bar()

BEGAN = time.monotonic()
TIME_IS_UP = "the time is up"


def pytest_addoption(parser):
    parser.addoption(
        "--budget", type=float, metavar="SECONDS",
        help="begin no further test after so many seconds; what is left out is named at the end",
    )  # fmt: skip


def pytest_make_parametrize_id(val):
    """A shape of a world as 2x1: slots x ranks per client."""
    pair = isinstance(val, tuple) and list(map(type, val)) == [int, int]
    return f"{val[0]}x{val[1]}" if pair else None


def group(nodeid):
    """Tests of one world come one after the other, in one worker; so do those that start processes
    of their own, those of a file that needs neither, and those of the cluster but for the longest
    file, which has a worker of its own. Larger groups begin earlier, so what ends last is small."""
    shape = re.search(r"[\[-](\d+x\d+)[\]-]", nodeid)
    file = nodeid.partition("::")[0]
    if file.startswith("tests/cluster/") and not file.endswith("test_slurm.py"):
        file = "launchers"
    elif file.startswith("tests/mpi/"):
        file = "processes"
    return f"world-{shape[1]}" if shape else file


class Groups(LoadScopeScheduling):  # type: ignore[misc]
    """xdist's loadgroup goes by node ids that this pytest no longer lets it change."""

    def _split_scope(self, nodeid):
        return group(nodeid)


def pytest_xdist_make_scheduler(config, log):
    return Groups(config, log) if config.getvalue("dist") == "loadgroup" else None


def pytest_collection_modifyitems(config, items):
    """The largest groups first is xdist's business; without it the order is this."""
    items.sort(key=lambda item: group(item.nodeid))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    budget = item.config.getoption("budget")
    if budget is not None and time.monotonic() - BEGAN > budget:
        pytest.skip(TIME_IS_UP)


def pytest_terminal_summary(terminalreporter):
    """From the reports, which workers send, and not from what a worker knows."""
    skipped = terminalreporter.stats.get("skipped", [])
    left_out = [report.nodeid for report in skipped if TIME_IS_UP in str(report.longrepr)]
    if left_out:
        terminalreporter.section(f"left out, since the time was up: {len(left_out)}")
        for name in left_out:
            terminalreporter.line(name)


@pytest.fixture
def datasets_folder():
    """The ten real tasks, where this checkout has them beside it."""
    if not DATASETS.is_dir():
        pytest.skip("real data: no folder ../shared/datasets beside this checkout")
    return DATASETS


@pytest.fixture(scope="session")
def common(tmp_path_factory):
    """A folder that all workers share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def worlds(common):
    """Persistent MPI worlds."""
    running = Worlds(common / "worlds.lock")
    yield running
    running.close()


def pytest_unconfigure(config):
    """A server that was started ends."""
    server = fork_server()
    if server is not None:
        server.end()
