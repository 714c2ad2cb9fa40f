"""`hpcfed status`: what run directories, jobs and locks say of runs, and that it only reads."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml

from hpcfed.app.cells import FORMAT, Cell
from hpcfed.app.cli import main
from hpcfed.app.compare import Comparison
from hpcfed.app.compare_file import load
from hpcfed.settings.resolve import resolve
from hpcfed.state import RunState, ServerState
from hpcfed.storage.commits import Origin
from hpcfed.storage.run import RunDirectory

HOLD = """import os, sys
from pathlib import Path
from hpcfed.storage.files import Lock
lock = Lock(Path(sys.argv[1]), "")
os.kill(os.getpid(), 9)"""


def begin(path, rounds, *words):
    """A run that this process holds, after so many rounds: of 2 s of training each and, every
    second one, 1 s of validation."""
    directory = RunDirectory(path)
    state = RunState(torch.zeros(3), ("0", "head"), ServerState(1.0))
    resolved = resolve("lora-fedavg", ["federation.rounds=8", *words])
    directory.create(resolved, {}, {}, {}, state, Origin("", "", ""))
    for number in range(1, rounds + 1):
        seconds = {"train": 2.0, "evaluate": 0.0}
        record: dict[str, object] = {"round": number, "seconds": seconds}
        if number % 2 == 0:
            seconds["evaluate"] = 1.0
            record["validation"] = {"personal": {"score": number / 10}}
        directory.record(record)
        state.rounds = number
        directory.commit(state)
    return directory


def finish(path, rounds=8):
    directory = begin(path, rounds)
    directory.save_summary({"accuracy": {}, "metric": "accuracy"})
    directory.close()


def asked(capsys, what, code=0):
    """What `hpcfed status --json` says: the runs by name, and the total."""
    assert main(["status", str(what), "--json"]) == code
    tree = json.loads(capsys.readouterr().out)
    return {own["run"]: own for own in tree["runs"]}, tree["total"]


def contents(folder):
    return {
        own: (own.stat().st_mtime_ns, own.read_bytes())
        for own in folder.rglob("*")
        if own.is_file()
    }


def test_a_run_half_done(tmp_path, capsys):
    """What is not committed does not count; nothing is changed."""
    directory = begin(tmp_path / "a", 5)
    with (tmp_path / "a" / "metrics.jsonl").open("a") as stream:
        stream.write('{"round": 6, "sec')
    before = contents(tmp_path)
    runs, total = asked(capsys, tmp_path / "a")
    # 2, 3, 2, 3, 2 s: 2.4 s a round
    assert runs["a"] == {
        "run": "a", "state": "running", "job": None, "rounds": 5, "planned": 8, "validation": 0.4,
        "validated": 4, "seconds_a_round": pytest.approx(2.4),
        "seconds_left": pytest.approx(7.2), "why": [],
    }  # fmt: skip
    assert total["seconds_left"] == pytest.approx(7.2)
    assert main(["status", str(tmp_path / "a")]) == 0
    assert "| a   | running | 5/8    | 0.4        | 2.4     | 0:07 |" in capsys.readouterr().out
    assert contents(tmp_path) == before
    directory.close()


def test_a_run_whose_process_has_ended(tmp_path, capsys):
    begin(tmp_path / "a", 2).close()
    assert asked(capsys, tmp_path / "a")[0]["a"]["state"] == "stopped"
    lock = tmp_path / "a" / "lock"
    killed = subprocess.run([sys.executable, "-c", HOLD, str(lock)], check=False)
    assert killed.returncode == -9 and "process" in lock.read_text()
    run = asked(capsys, tmp_path / "a")[0]["a"]
    assert run["state"] == "stopped" and "--resume" in run["why"][0]
    # This process's number, which does not hold it; and a host that is another.
    here = lock.read_text().split()[3]
    lock.write_text(f"process {os.getpid()} on {here} since then")
    assert asked(capsys, tmp_path / "a")[0]["a"]["state"] == "stopped"
    lock.write_text("process 1 on elsewhere of Slurm job 7 since then")
    run = asked(capsys, tmp_path / "a")[0]["a"]
    assert run["state"] == "begun" and "elsewhere of Slurm job 7" in run["why"][0]


def test_a_finished_run(tmp_path, capsys):
    finish(tmp_path / "a")
    runs, total = asked(capsys, tmp_path / "a")
    assert (runs["a"]["state"], runs["a"]["rounds"], runs["a"]["why"]) == ("complete", 8, [])
    assert runs["a"]["validation"] == 0.8 and total["seconds_left"] == 0.0


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("checkpoint/manifest.json", b"{", "manifest.json is damaged (it is not JSON)"),
        ("checkpoint/manifest.json", b"{}", "lacks 'rounds'"),
        ("checkpoint/manifest.json", None, "manifest.json is missing"),
        ("metrics.jsonl", b"[]\n", "metrics.jsonl is not what was committed"),
        ("metrics.jsonl", None, "metrics.jsonl is missing"),
        ("summary.json", b"no", "summary.json is damaged"),
    ],
)
def test_a_damaged_run(tmp_path, capsys, name, content, said):
    """It is said which file; the others are shown as ever."""
    finish(tmp_path / "a")
    begin(tmp_path / "b", 3).close()
    file = tmp_path / "a" / name
    file.unlink() if content is None else file.write_bytes(content)
    run = asked(capsys, tmp_path / "a", 1)[0]["a"]
    assert run["state"] == "damaged" and said in run["why"][0]
    (tmp_path / "jobs.json").write_text(
        json.dumps({"a": {"job": "999999999", "executor": "local"}})
    )
    runs, total = asked(capsys, tmp_path, 1)
    assert total["states"] == {"stopped": 1, "damaged": 1} and total["seconds_left"] > 0
    assert runs["b"]["rounds"] == 3


@pytest.fixture
def sweep(tmp_path):
    """Its file; its runs: complete, running, waiting, failed, new."""
    folder = tmp_path / "sweep"
    file = tmp_path / "sweep.yaml"
    tree = {
        "source": "lora-fedavg", "folder": str(folder), "executor": "local",
        "overrides": {"federation.rounds": 8}, "grid": {"seed": [1, 2, 3, 4, 5]},
    }  # fmt: skip
    file.write_text(yaml.safe_dump(tree))
    finish(folder / "seed=1")
    begin(folder / "seed=4", 4).close()
    begin(folder / "seed=2", 2).close()
    sleep = [sys.executable, "-c", "import time; time.sleep(100)", "submitit"]
    jobs = [subprocess.Popen(sleep) for _ in range(2)]
    numbers = {"seed=1": "999999998", "seed=2": str(jobs[0].pid), "seed=3": str(jobs[1].pid)}
    known = {
        name: {"job": number, "executor": "local", "tasks": 1}
        for name, number in {**numbers, "seed=4": "999999999"}.items()
    }
    (folder / "jobs.json").write_text(json.dumps(known))
    (folder / "turn").write_text(numbers["seed=2"] + "\n")
    (folder / "logs").mkdir()
    log = folder / "logs" / "999999999_0_log.err"
    log.write_text("loading\nhpcfed: no such task.\nsubmitit ERROR\n")
    yield file
    for job in jobs:
        job.kill()
        job.wait()


STATES = {"complete": 1, "running": 1, "waiting": 1, "failed": 1, "new": 1}


def test_a_sweep(sweep, capsys):
    before = contents(sweep.parent)
    runs, total = asked(capsys, sweep, 1)
    assert [own["state"] for own in runs.values()] == [
        "complete", "running", "waiting", "failed", "new",
    ]  # fmt: skip
    assert runs["seed=3"]["why"] == ["for its turn, which seed=2 has"]
    assert runs["seed=4"]["why"] == ["hpcfed: no such task."]
    assert total["states"] == STATES
    assert (total["rounds"], total["planned"]) == (14, 40)
    paces = [own["seconds_a_round"] for own in runs.values() if own["seconds_a_round"]]
    pace = sum(paces) / len(paces)
    seconds = 6 * runs["seed=2"]["seconds_a_round"] + 4 * runs["seed=4"]["seconds_a_round"]
    assert total["seconds_left"] == pytest.approx(seconds + 16 * pace)
    assert main(["status", str(sweep)]) == 1
    shown = capsys.readouterr().out
    assert "5 runs: 1 complete, 1 running, 1 waiting, 1 failed, 1 new; 14/40 rounds, abo" in shown
    assert "seed=4 failed (job 999999999, 4 rounds committed):\n    hpcfed: no such" in shown
    assert main(["sweep", "status", str(sweep)]) == 1
    assert capsys.readouterr().out == shown
    assert contents(sweep.parent) == before


def test_the_folder_of_a_sweep_and_a_run_in_it(sweep, capsys):
    """Runs that were never submitted are in no folder."""
    folder = sweep.parent / "sweep"
    runs, total = asked(capsys, folder, 1)
    assert list(runs) == ["seed=1", "seed=2", "seed=3", "seed=4"]
    assert total["planned"] is None  # seed=3 has written nothing yet
    assert asked(capsys, folder / "seed=4", 1)[0]["seed=4"]["why"] == ["hpcfed: no such task."]
    (folder / "jobs.json").write_text("[]")
    assert main(["status", str(folder)]) == 2
    assert "jobs.json is damaged" in capsys.readouterr().err


def test_a_comparison(tmp_path, capsys):
    """What is kept as a cell only, what runs, and what waits for a choice."""
    file = tmp_path / "spec.yaml"
    tree = {
        "folder": str(tmp_path / "c"), "methods": ["lora-fedavg", "fedprox"], "seeds": [1],
        "overrides": {"federation.rounds": 8}, "tune": {"local.lr": [0.1, 0.2]},
    }  # fmt: skip
    file.write_text(yaml.safe_dump(tree))
    comparison = Comparison(load(file))
    first, second, *_ = comparison.tuning()
    content = {
        "format": FORMAT, "settings": first.settings, "test": None,
        "curve": [{"round": 8, "score": 0.7}], "spent": {"seconds": 16.0, "total": 20.0},
    }  # fmt: skip
    comparison.store.keep(first.identity, Cell(content))
    folder = tmp_path / "c" / "runs"
    directory = begin(folder / second.name, 4)
    jobs = {own.name: {"job": "999999999", "executor": "local"} for own in (first, second)}
    (folder / "jobs.json").write_text(json.dumps(jobs))
    runs, total = asked(capsys, file)
    assert total["states"] == {"complete": 1, "running": 1, "new": 2}
    assert (total["rounds"], total["planned"], total["unchosen"]) == (12, 32, 2)
    assert runs[first.name]["validation"] == 0.7 and runs[first.name]["seconds_a_round"] == 2.0
    assert main(["status", str(file)]) == 0
    assert "2 more wait for tuned values" in capsys.readouterr().out
    runs, total = asked(capsys, tmp_path / "c")
    assert total["states"] == {"complete": 1, "running": 1} and total["planned"] == 16
    directory.close()


def test_what_is_no_run(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "own.yaml").write_text("seed: 3")
    for what, said in (
        ("nowhere", "does not exist"),
        ("empty", "is no run directory (it has no metrics.jsonl)"),
        ("own.yaml", "describes neither a sweep nor a comparison"),
    ):
        assert main(["status", str(tmp_path / what)]) == 2
        told = capsys.readouterr()
        assert said in told.err and told.err.count("\n") == 1 and not told.out
