"""The scripts in slurm/ on two hosts: they agree with a run here, and survive what clusters do."""

import json
import re
import shutil
import subprocess
import sys
import time

import pytest

from tests.cluster.methods import LONG, METHODS, SOME, words
from tests.same import assert_same
from tests.support import ROOT

BOTH = ("--nodes=2",)
ONE = {"RANKS_PER_NODE": "1"}
# The lab's user is root, whom mpirun warns.
ROOT_MAY = {
    f"{stem}_ALLOW_RUN_AS_ROOT{end}": "1" for stem in ("OMPI", "PRTE") for end in ("", "_CONFIRM")
}


def lives(out):
    return json.loads((out / "run.json").read_text())["lives"]


def rounds_reach(lab, job, out, number, log, seconds=180):
    """Wait until so many rounds are committed."""
    until = time.monotonic() + seconds
    manifest = out / "checkpoint" / "manifest.json"
    while not (manifest.exists() and json.loads(manifest.read_text())["rounds"] >= number):
        assert time.monotonic() < until, log.read_text() if log.exists() else "no log"
        lab.hurry(job)
        time.sleep(0.2)


def wait_for(log, words, times=1, seconds=120):
    """Wait until the log says so."""
    until = time.monotonic() + seconds
    while log.read_text().count(words) < times:
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.2)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_the_scripts_pass_shellcheck():
    scripts = [*(ROOT / "slurm").glob("*.sh"), ROOT / "tests" / "cluster" / "lab.sh"]
    done = subprocess.run(
        ["shellcheck", "-x", *map(str, scripts)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("method", "launch", "ranks"),
    [("fibecfed", "srun", 2), ("fedpeptao", "srun", 1), ("fibecfed", "mpirun", 1)],
)
def test_sbatch_across_both_hosts(lab, shared, undisturbed, method, launch, ranks):
    """So many ranks, each a slot, on each host: the same bits as on one rank."""
    name = f"{method}-{launch}"
    log = shared / f"{name}.out"
    job = lab.submit(
        *BOTH, f"--output={log}", f"slurm/{method}.sh", *words(method, shared, name),
        LAUNCH=launch, RANKS_PER_NODE=str(ranks), **ROOT_MAY,
    )  # fmt: skip
    assert lab.ends(job, log=log) == "COMPLETED", log.read_text()
    assert_same(shared / name, undisturbed[method])
    assert lives(shared / name)[0]["hosts"] == {"n1": ranks, "n2": ranks}


def test_two_jobs_on_the_same_hosts(lab, shared, undisturbed):
    """At the same time: no port or file in common."""
    logs = [shared / f"pair{i}.out" for i in range(2)]
    jobs = [
        lab.submit(
            *BOTH, "--ntasks-per-node=1", "--oversubscribe", f"--output={logs[i]}",
            f"slurm/{method}.sh", *words(method, shared, f"pair{i}"),
        )
        for i, method in enumerate(METHODS)
    ]  # fmt: skip
    for job, log in zip(jobs, logs, strict=True):
        assert lab.ends(job, log=log) == "COMPLETED", log.read_text()
    for i, method in enumerate(METHODS):
        assert_same(shared / f"pair{i}", undisturbed[method])


def test_signals_requeue_and_a_time_limit(lab, shared, undisturbed):
    """USR1, scontrol requeue, and a time limit strike in mid-run: four lives, the same bits. And a
    second job on the run directory is refused, naming the holder."""
    out, log = shared / "disturbed", shared / "disturbed.out"
    run = words("fibecfed", shared, "disturbed", *LONG)
    job = lab.submit(
        *BOTH, "--time=20", "--signal=B:USR1@50", f"--output={log}", "slurm/fibecfed.sh", *run,
        GRACE="25", **ONE,
    )  # fmt: skip
    rounds_reach(lab, job, out, 1, log)
    second = lab.run(
        sys.executable, "-m", "hpcfed", "run", "fibecfed", *run, "cluster.grace_seconds=25",
        "--resume", code=2,
    )  # fmt: skip
    assert re.search(rf"in use by process \d+ on n1 of Slurm job {job} since", second), second
    lab.run("scancel", "--signal=USR1", job)
    began = lives_reach(lab, job, out, 2, log)
    rounds_reach(lab, job, out, began + 2, log)
    lab.run("scontrol", "requeue", job)
    began = lives_reach(lab, job, out, 3, log)
    rounds_reach(lab, job, out, began + 2, log)
    # A minute: less than 50 s are left at once.
    lab.run("scontrol", "update", f"JobId={job}", "TimeLimit=1")
    wait_for(log, "time is nearly up")
    wait_for(log, "requeued", times=2)
    lab.run("scontrol", "update", f"JobId={job}", "TimeLimit=20")
    assert lab.ends(job, log=log) == "COMPLETED", log.read_text()
    assert len(lives(out)) == 4
    assert_same(out, undisturbed["fibecfed-long"])


def test_lost_nodes(lab, shared, undisturbed):
    """First the node that is not the batch host, then the batch host; the run ends on what is
    left, from the last committed round."""
    out, log = shared / "lost", shared / "lost.out"
    job = lab.submit(
        "--nodes=1-2", f"--output={log}", "slurm/fibecfed.sh",
        *words("fibecfed", shared, "lost", *SOME), **ONE,
    )  # fmt: skip
    rounds_reach(lab, job, out, 2, log)
    assert lives(out)[0]["hosts"] == {"n1": 1, "n2": 1}
    try:
        lab.lose("n2")
        began = lives_reach(lab, job, out, 2, log)
        assert re.search(r"lost: n2 (does not answer|is down)", log.read_text())
        assert lives(out)[1]["hosts"] == {"n1": 1}, "half of the slots"
        rounds_reach(lab, job, out, began + 2, log)
        lab.restore("n2")
        lab.lose("n1")
        lives_reach(lab, job, out, 3, log)
        assert lives(out)[2]["hosts"] == {"n2": 1}
        assert "lost: n1 is down" in log.read_text()
        assert lab.ends(job, log=log) == "COMPLETED", log.read_text()
    finally:
        for node in ("n1", "n2"):
            lab.restore(node)
    assert_same(out, undisturbed["fibecfed-some"])


def lives_reach(lab, job, out, number, log, seconds=240):
    """Wait for a life of the run; how many rounds were committed when it began."""
    until = time.monotonic() + seconds
    while len(lives(out)) < number:
        assert time.monotonic() < until, log.read_text()
        lab.hurry(job)
        time.sleep(0.5)
    return lives(out)[number - 1]["rounds_done"]
