"""Nobody waits for ever, and no process is left behind: hangs, Ctrl-C, and launchers that die."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from hpcfed.cluster.stop import INTERRUPTED
from tests.mpi.test_dead_rank import processes_of
from tests.mpi.test_instruct import overrides as talks
from tests.mpi.variants import overrides
from tests.same import metrics
from tests.support import PYTHONPATH, ROOT, line, on_ranks

SECONDS = 240  # until a job that should end is given up
DEADLINE = 0.1  # minutes

HANGS = [
    pytest.param((2, 1), "train client=0", "training client 0 in round 2", id="train-2x1"),
    pytest.param((1, 2), "train rank=1", "training client", id="train-1x2",
                 marks=pytest.mark.long),
    *(
        pytest.param(shape, f"{phase} rank=1", says, id=f"{phase}-{shape[0]}x{shape[1]}",
                     marks=pytest.mark.long)
        for shape in ((2, 1), (1, 2))
        for phase, says in (("select", "choosing the shared layers"),
                            ("exchange", "the exchange of round 2"),
                            ("evaluate", "validating round 2"), ("commit", "committing round 2"))
    ),
]  # fmt: skip


def words(data, out, shape):
    stage = "zero2" if shape[1] > 1 else "zero0"
    return [
        *overrides(data, "sgd", stage), f"model.name={data}/bert-classifier", f"output={out}",
        "layers.score=last", "layers.keep=0.5", "curriculum.warmup=1", "evaluation.every=1",
        "data.validation=0.2", f"cluster.ranks_per_client={shape[1]}",
    ]  # fmt: skip


def start(data, out, shape, *extra, fail="", log=None):
    """`hpcfed run --ranks` in the background."""
    own = ["run", "lora-fedavg", *words(data, out, shape), *extra]
    own = line([*own, f"--ranks={shape[0] * shape[1]}"])
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "HPCFED_FAIL_AT": fail}
    return subprocess.Popen(
        [sys.executable, "-m", "hpcfed", *own], cwd=ROOT, env=environment, text=True,
        stdout=log or subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def all_gone(out):
    """Whether no process of a run is left, a little later."""
    until = time.monotonic() + SECONDS
    while processes_of(out) and time.monotonic() < until:
        time.sleep(0.2)
    return not processes_of(out)


def committed(out, rounds):
    """Wait until so many rounds are committed."""
    until = time.monotonic() + SECONDS
    manifest = out / "checkpoint" / "manifest.json"
    while time.monotonic() < until:
        if manifest.exists() and json.loads(manifest.read_text())["rounds"] >= rounds:
            return
        time.sleep(0.1)
    pytest.fail(f"{out}: not {rounds} rounds after {SECONDS} s")


@pytest.mark.parametrize(("shape", "where", "says"), HANGS)
def test_a_rank_that_hangs(worlds, data, tmp_path, shape, where, says):
    """The job ends, one sentence names who is missing and what it did last, and the run goes on
    with the same bits."""
    phase, who = where.split()
    out = tmp_path / "hung"
    job = start(
        data, out, shape, f"cluster.timeout_minutes={DEADLINE}",
        fail=f"round=2 {who} kind=hang in={phase}",
    )  # fmt: skip
    try:
        printed, _ = job.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        job.kill()
        pytest.fail(f"the job was still there after {SECONDS} s: {processes_of(out)}")
    assert job.returncode not in (0, 2, INTERRUPTED), printed
    (said,) = [own for own in printed.splitlines() if "nothing has moved" in own]
    assert says in said and "--resume" in said, said
    assert all_gone(out)
    assert len(metrics(out)) <= 2
    for folder, more in ((out, ["--resume"]), (tmp_path / "whole", [])):
        own = ["run", "lora-fedavg", *words(data, folder, shape), *more]
        ranks = worlds.call(shape, "tests.mpi.cases.runs:command_line", words=own)
        assert [code for code, _, _ in ranks] == [0, 0], ranks
    assert metrics(tmp_path / "whole") == metrics(out)


def test_ctrl_c(data, tmp_path):
    """It ends the round and the run in good order, and what to do is said."""
    out, endless = tmp_path / "run", "federation.rounds=100000"
    with (tmp_path / "log").open("w+") as log:
        job = start(data, out, (2, 1), endless, log=log)
        committed(out, 2)
        job.send_signal(signal.SIGINT)
        assert job.wait(SECONDS) == INTERRUPTED
        log.seek(0)
        printed = log.read()
    assert "stopping; the round in flight" in printed and "--resume" in printed
    assert "Traceback" not in printed
    assert all_gone(out)


@pytest.mark.long
def test_a_dead_mpiexec(data, tmp_path):
    """After a SIGKILL of it no rank lives on, and what to do is said."""
    out = tmp_path / "run"
    with (tmp_path / "log").open("w+") as log:
        job = start(data, out, (2, 1), "federation.rounds=100000", log=log)
        committed(out, 2)
        (mpiexec,) = children(job.pid)
        os.kill(mpiexec, signal.SIGKILL)
        assert job.wait(SECONDS) not in (0, 2, INTERRUPTED)
        log.seek(0)
        last = log.read().splitlines()[-1]
    assert "before the run was complete" in last and "--resume" in last
    assert all_gone(out)


@pytest.mark.long
def test_out_of_memory_where_others_wait(data, tmp_path):
    """In backward at ZeRO-2, one of a client's two ranks: the job ends, and names the client."""
    out = tmp_path / "run"
    job = start(data, out, (1, 2), fail="round=2 rank=1 kind=oom")
    printed, _ = job.communicate(timeout=SECONDS)
    assert job.returncode not in (0, 2, INTERRUPTED)
    (said,) = [own for own in printed.splitlines() if own.startswith("hpcfed: rank 1 failed")]
    assert "training client" in said and "OutOfMemoryError" in said and "--resume" in said
    assert all_gone(out) and len(metrics(out)) == 1


# On rank 1 a layer fails while an answer is written.
BROKEN = """
import os
import torch
from hpcfed.engine.generation import Answers
step = Answers.step
def fail(module, args):
    if type(module).__name__ == "LlamaDecoderLayer":
        raise RuntimeError("a layer fails")
def failing(answers, network):
    if os.environ["OMPI_COMM_WORLD_RANK"] == "1":
        torch.nn.modules.module.register_module_forward_pre_hook(fail)
    return step(answers, network)
Answers.step = failing
"""


@pytest.mark.long
def test_a_failure_while_answers_are_written(data, tmp_path):
    """Under ZeRO-3, on one of a client's two ranks: the other does not wait, the job ends."""
    (tmp_path / "broken.py").write_text(BROKEN)
    words = [
        *talks(data, "llama"), "evaluation.max_new_tokens=5", "deepspeed=ds_configs/zero3.json",
        "cluster.ranks_per_client=2", f"plugins=[{tmp_path}/broken.py]", f"output={tmp_path}/run",
    ]  # fmt: skip
    command, environment = on_ranks(2, "hpcfed", "run", "lora-fedavg", *words)
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode not in (0, 2, INTERRUPTED), done.stderr
    said = [own for own in done.stderr.splitlines() if own.startswith("hpcfed: rank 1 failed")]
    assert len(said) == 1 and "evaluating" in said[0] and "a layer fails" in said[0], done.stderr


@pytest.mark.long
def test_a_dead_parent(data, tmp_path):
    """After a SIGKILL of the process that started mpiexec nothing lives on."""
    out = tmp_path / "run"
    job = start(data, out, (2, 1), "federation.rounds=100000")
    committed(out, 2)
    job.kill()
    assert all_gone(out)


def children(pid):
    """Processes that this one has started."""
    with open(f"/proc/{pid}/task/{pid}/children") as stream:
        return [int(word) for word in stream.read().split()]
