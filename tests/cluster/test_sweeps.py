"""Sweeps through submitit: 2 x 2 runs across both hosts, and the same without Slurm."""

import json
import os
import subprocess
import sys
import time

import yaml

from tests.cluster.methods import SOME, words
from tests.same import assert_same
from tests.support import ROOT

FROM_PYTHON = """
import sys, yaml
from hpcfed.app.sweep import Sweep
sweep = Sweep(yaml.safe_load(open(sys.argv[1])))
print("submitted", len(sweep.submit()))
sweep.wait()
print(sweep.table())
"""


def describe(shared, name, extra=(), **more):
    """2 x 2 runs, one rank a node; extra: overrides of all."""
    tree = {
        "source": "fibecfed",
        "folder": str(shared / name),
        "executor": "slurm",
        "overrides": {
            key: yaml.safe_load(value)
            for key, value in (own.split("=", 1) for own in words("fibecfed", shared, "", *extra))
            if key != "output"
        },
        "grid": {"seed": [1, 2], "task.max_length": [16, 32]},
        "cluster": {"nodes": 2, "tasks_per_node": 1, "timeout_min": 20},
        **more,
    }
    file = shared / f"{name}.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def sweep_line(file, *words):
    return [sys.executable, "launch/sweep.py", *words, str(file)]


def break_one(out, name):
    """One run cannot be made: a file has its name."""
    out.mkdir()
    (out / name).write_text("in the way")


def check(out, submit, status):
    """Four runs of which one fails; resubmitted alone, it ends well. submit(): what it printed."""
    broken = "seed=2_max_length=16"
    break_one(out, broken)
    printed = submit()
    assert printed.count("| complete") == 3 and printed.count("| failed") == 1, printed
    shown = status()
    assert f"{broken} failed" in shown and "hpcfed: " in shown and broken in shown
    before = json.loads((out / "jobs.json").read_text())
    (out / broken).unlink()
    printed = submit()
    assert printed.count("| complete") == 4, printed
    after = json.loads((out / "jobs.json").read_text())
    assert {name for name in after if after[name] != before[name]} == {broken}


def test_on_slurm(lab, shared):
    """Submitted from Python, looked at from the command line."""
    file, out = describe(shared, "sweep"), shared / "sweep"
    check(
        out,
        lambda: lab.run(sys.executable, "-c", FROM_PYTHON, str(file), timeout=400),
        lambda: lab.run(*sweep_line(file, "status"), code=1),
    )
    run = json.loads((out / "seed=1_max_length=16" / "run.json").read_text())
    assert run["lives"][0]["hosts"] == {"n1": 1, "n2": 1}
    assert "submitted 0 of 4" in lab.run(*sweep_line(file, "submit"))


def test_as_a_job_array_of_slurm_alone(lab, shared):
    """slurm/sweep.sh, and a line that the sweep does not have."""
    file = describe(shared, "array", grid={"seed": [1, 2]})
    log = shared / "array-%a.out"
    job = lab.submit(
        "--array=0-2", "--nodes=2", f"--output={log}", "slurm/sweep.sh", str(file),
        "federation.rounds=2", RANKS_PER_NODE="1",
    )  # fmt: skip
    states = [lab.ends(f"{job}_{line}", log=shared / f"array-{line}.out") for line in range(3)]
    assert states == ["COMPLETED", "COMPLETED", "FAILED"]
    assert "There is no run 2" in (shared / "array-2.out").read_text()
    assert lab.run(*sweep_line(file, "status")).count("| complete") == 2
    run = json.loads((shared / "array" / "seed=1" / "run.json").read_text())
    assert run["lives"][0]["hosts"] == {"n1": 1, "n2": 1}


def test_a_time_limit_under_submitit(lab, shared, undisturbed):
    """submitit's signal reaches a run: its job is requeued and goes on; the same bits as in a run
    that nothing disturbs."""
    file = describe(shared, "limited", extra=SOME, grid={"seed": [352]})
    lab.run(*sweep_line(file, "submit"))
    out = shared / "limited" / "seed=352"
    job = json.loads((shared / "limited" / "jobs.json").read_text())["seed=352"]["job"]
    manifest, until = out / "checkpoint" / "manifest.json", time.monotonic() + 120
    while not (manifest.exists() and json.loads(manifest.read_text())["rounds"] >= 3):
        assert time.monotonic() < until
        time.sleep(0.2)
    lab.run("scancel", "--signal=USR2", job)
    assert lab.ends(job) == "COMPLETED"
    lives = json.loads((out / "run.json").read_text())["lives"]
    assert len(lives) == 2 and lives[1]["rounds_done"] >= 3
    assert_same(out, undisturbed["fibecfed-some"])


def test_without_slurm(shared):
    """`local`: one process a job, which starts mpiexec; jobs take turns."""
    cluster = {"nodes": 1, "tasks_per_node": 2, "timeout_min": 20}
    file = describe(shared, "here", executor="local", cluster=cluster)

    def run(*words):
        done = subprocess.run(
            sweep_line(file, *words), cwd=ROOT, capture_output=True, text=True, timeout=400,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        return done.stdout + done.stderr

    check(shared / "here", lambda: run("submit", "--wait"), lambda: run("status"))
