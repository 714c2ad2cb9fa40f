"""hpcfed from Python, up to where a run starts; runs themselves: tests/mpi/test_api.py."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest

import hpcfed
from hpcfed.app import cli
from hpcfed.cluster import launcher
from hpcfed.settings.resolve import describe, resolve


class Mpiexec:
    """Takes down what it would be asked for, (ranks, words), and writes a result, or ends with the
    code that is set."""

    def __init__(self, folder):
        self.folder, self.calls, self.code = folder, [], 0

    def __call__(self, ranks, words, grace=0.0):
        self.calls.append((ranks, words))
        if not self.code:
            complete(self.folder)
        return self.code


@pytest.fixture
def started(monkeypatch, tmp_path):
    """What is started instead of mpiexec; its run directory is tmp_path/run."""
    mpiexec = Mpiexec(tmp_path / "run")
    monkeypatch.setattr(launcher, "start", mpiexec)
    return mpiexec


SUMMARY = {"rounds": 2, "test": {}}


def complete(folder):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text('{"round": 1}\n{"round": 2}\n')
    (folder / "summary.json").write_text(json.dumps(SUMMARY))


def test_the_version(capsys):
    assert hpcfed.__version__ == version("hpcfed")
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"hpcfed {version('hpcfed')}\n"


def test_all_that_it_offers_is_there():
    assert all(getattr(hpcfed, name) is not None for name in hpcfed.__all__)
    with pytest.raises(AttributeError, match="'hpcfed' has no attribute 'runn'"):
        hpcfed.runn  # noqa: B018


def test_a_result_is_read(tmp_path):
    with pytest.raises(hpcfed.UserError, match=r"no complete run \(.*summary\.json is missing"):
        hpcfed.Result.read(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"round": 1}\n')
    with pytest.raises(hpcfed.UserError, match="no complete run"):
        hpcfed.Result.read(str(tmp_path))
    complete(tmp_path)
    result = hpcfed.Result.read(str(tmp_path))
    assert result.path == tmp_path and result.summary == SUMMARY
    assert [line["round"] for line in result.metrics] == [1, 2]


WORDS = {"number": "1", "person": "no", "place": "null", "reason": "a: b", "time": "#"}
VALUES = {
    "local.lr": 1e-05,
    "federation": {"rounds": 3, "clients": 5, "per_round": 2},
    "adapter.targets": ["query", "dense"],
    "data.root": None,
    "model.gradient_checkpointing": True,
    "model.head": "cloze",
    "task": {"name": "questions", "template": "{a} <mask>", "verbalizer": WORDS},
    "layers": {"score": "first", "keep": "lossless"},
}


def test_overrides_as_a_mapping_or_a_list(started, tmp_path):
    result = hpcfed.run("lora-fedavg", {**VALUES, "output": tmp_path / "run"}, ranks=2)
    assert result.summary == SUMMARY and result.path == tmp_path / "run"
    ((ranks, words),) = started.calls
    assert ranks == 2 and words[:2] == ["run", "lora-fedavg"]
    shutil.rmtree(tmp_path / "run")
    plain = [word for word in words[2:] if not word.startswith("--")]
    assert hpcfed.run("lora-fedavg", plain, ranks=2).summary == SUMMARY
    assert started.calls[1] == (ranks, words)
    config = resolve("lora-fedavg", plain).config
    assert (config.local.lr, config.federation.per_round) == (1e-05, 2)
    assert config.adapter.targets == ("query", "dense") and config.data.root is None
    assert config.task.verbalizer == WORDS and config.layers.keep == "lossless"
    assert Path(config.output) == tmp_path / "run" and config.model.gradient_checkpointing


@pytest.mark.parametrize(
    ("overrides", "ranks", "words"),
    [
        ({"local.lrr": 1}, None, "did you mean 'local.lr'"),
        ({"federation.per_round": 101}, 2, "per_round is 101 but federation.clients is 100"),
        ({}, 0, "--ranks is 0"),
        ({"cluster.ranks_per_client": 2}, 3, "3 MPI ranks do not divide"),
        ({"task.name": "other"}, 2, "Unknown task 'other'"),
    ],
)
def test_what_the_user_can_mend_is_raised(started, capsys, tmp_path, overrides, ranks, words):
    with pytest.raises(hpcfed.UserError, match=words):
        hpcfed.run("lora-fedavg", {**overrides, "output": tmp_path / "run"}, ranks=ranks)
    assert not started.calls
    assert capsys.readouterr().err == "", "it is raised, and not said as well"


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [(2, hpcfed.UserError, "what they said is above"), (1, RuntimeError, "failed with code 1"),
     (75, RuntimeError, "go on with resume=True")],
)  # fmt: skip
def test_ranks_that_end_otherwise(started, tmp_path, code, kind, words):
    started.code = code
    with pytest.raises(kind, match=words):
        hpcfed.run("lora-fedavg", {"output": tmp_path / "run"}, ranks=2)


def test_a_complete_run_is_only_read(started, tmp_path):
    own = {"output": tmp_path / "run", "federation.rounds": 2}
    hpcfed.run("lora-fedavg", own, ranks=2, resume=True)
    assert started.calls[0][1][-1] == "--resume"
    text = describe(resolve("lora-fedavg", [f"output={tmp_path}/run", "federation.rounds=2"]))
    (tmp_path / "run" / "config.yaml").write_text(text)
    assert hpcfed.run("lora-fedavg", own, ranks=2, resume=True).summary == SUMMARY
    assert len(started.calls) == 1
    with pytest.raises(hpcfed.UserError, match="seed=42, not 7"):
        hpcfed.run("lora-fedavg", {**own, "seed": 7}, ranks=2, resume=True)
    with pytest.raises(hpcfed.UserError, match="exists already"):
        hpcfed.run("lora-fedavg", own, ranks=2)
