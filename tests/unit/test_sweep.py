"""Sweeps: what a description means, what is refused, what submitit is told."""

import json
import re
from pathlib import Path

import pytest
import yaml

from hpcfed.app.cli import main
from hpcfed.app.sweep import Sweep
from hpcfed.errors import UserError
from hpcfed.settings.resolve import resolve
from tests import documented
from tests.support import ROOT

GOLDEN = Path(__file__).parent / "golden" / "sweep.sbatch"


def description(folder, **more):
    return {"source": "fibecfed", "folder": str(folder), **more}


def test_list_times_grid(tmp_path):
    sweep = Sweep(
        description(
            tmp_path,
            overrides={"task.name": "trec"},
            list=[{"method": "fibecfed"}, {"method": "fedpeptao", "local.lr": 0.01}],
            grid={"data.partition.alpha": [0.3, 1.0], "seed": [1, 2]},
        )
    )
    assert len(sweep.runs) == 8
    assert sweep.runs["method=fedpeptao_lr=0.01_alpha=0.3_seed=2"] == [
        "task.name=trec", "method=fedpeptao", "local.lr=0.01", "data.partition.alpha=0.3",
        "seed=2", f"output={tmp_path}/method=fedpeptao_lr=0.01_alpha=0.3_seed=2",
    ]  # fmt: skip
    assert sweep.line(7)[:3] == ["fibecfed", "task.name=trec", "method=fedpeptao"]
    with pytest.raises(UserError, match=r"no run 8.*--array=0-7"):
        sweep.line(8)


def test_each_option_is_said_once(tmp_path):
    """The list wins over the overrides, sections over sections; what comes later over both."""
    sweep = Sweep(
        description(
            tmp_path,
            overrides={"local": {"lr": 0.1, "epochs": 3}, "seed": 1},
            list=[{"local.lr": 0.2}],
        )
    )
    assert sweep.line(0) == [
        "fibecfed", "local.lr=0.2", "local.epochs=3", "seed=1", f"output={tmp_path}/lr=0.2",
    ]  # fmt: skip
    assert sweep.line(0, ["seed=5", "local.clip=2"])[1:] == [
        "local.lr=0.2", "local.epochs=3", "seed=5", f"output={tmp_path}/lr=0.2", "local.clip=2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("executor", "cluster", "device"),
    [
        ("slurm", {"gpus_per_node": 4}, "cuda"),
        ("slurm", {"slurm_gpus_per_task": 1}, "cuda"),
        ("slurm", {"slurm_gres": "gpu:2"}, "cuda"),
        ("slurm", {"slurm_gres": "tmpfs:2", "slurm_partition": "gpu"}, "auto"),
        ("local", {"gpus_per_node": 4}, "auto"),
    ],
)
def test_runs_that_were_given_gpus_must_see_them(tmp_path, executor, cluster, device):
    spec = description(tmp_path, executor=executor, cluster=cluster)
    assert Sweep(spec).resolved("run").config.cluster.device == device
    own = Sweep({**spec, "overrides": {"cluster": {"device": "cpu"}}})
    assert own.resolved("run").config.cluster.device == "cpu"


@pytest.mark.parametrize(
    "value", ["a\nb", "'a'\n\n\"b\"", " a ", "a=b", "yes", "", "#", "{a: b}\t|"]
)
def test_a_line_keeps_any_value(tmp_path, capsys, value):
    """Through `hpcfed sweep line`, whose words end in NUL, and back."""
    file = tmp_path / "sweep.yaml"
    own = {"model.head": "cloze", "task.template": value}
    file.write_text(yaml.safe_dump(description(tmp_path, overrides=own)))
    assert main(["sweep", "line", "0", str(file)]) == 0
    source, *words, end = capsys.readouterr().out.split("\0")
    assert end == "" and len(words) == 3
    assert resolve(source, words).config.task.template == value


@pytest.mark.parametrize("part", ["overrides", "grid", "list"])
def test_output_is_the_sweeps(tmp_path, part):
    values = {"overrides": {"output": "x"}, "grid": {"output": ["x"]}, "list": [{"output": "x"}]}
    with pytest.raises(UserError, match="output is not a sweep's to set"):
        Sweep(description(tmp_path, **{part: values[part]}))


def test_one_run_and_equal_names(tmp_path):
    assert list(Sweep(description(tmp_path)).runs) == ["run"]
    twice = Sweep(description(tmp_path, grid={"task.name": ["a/b", "a-b"]}))
    assert list(twice.runs) == ["name=a-b", "name=a-b-2"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"grids": {}}, ["'grids'", "legal here", "grid"]),
        ({"source": ""}, ["source is missing"]),
        ({"executor": "slrm"}, ["'slrm'", "slurm, local, debug"]),
        ({"grid": {"seed": 3}}, ["grid.seed", "list of values"]),
        ({"grid": ["seed"]}, ["grid must be keys and values"]),
        ({"list": [3]}, ["each item of list"]),
        ({"cluster": {"node": 2}}, ["cluster.node", "nodes"]),
        ({"cluster": {"nodes": "two"}}, ["cluster.nodes is 'two'", "whole number"]),
        ({"cluster": {"tasks_per_node": 0}}, ["cluster.tasks_per_node is 0"]),
        ({"overrides": {"federation.per_round": 500}}, ["run run", "per_round is 500"]),
        ({"overrides": {"cluster.ranks_per_client": 2}}, ["1 MPI ranks do not divide"]),
        ({"grid": {"sede": [1]}}, ["run sede=1", "'sede'", "did you mean 'seed'"]),
        ({"overrides": {"local.epochs": "two"}}, ["local.epochs", "whole number"]),
    ],
)
def test_bad_descriptions(tmp_path, more, words):
    with pytest.raises(UserError) as failure:
        Sweep(description(tmp_path, **more))
    assert all(word in str(failure.value) for word in words), failure.value
    assert not list(tmp_path.iterdir())


def test_files_that_cannot_be_read(tmp_path):
    file = tmp_path / "sweep.yaml"
    with pytest.raises(UserError, match="cannot be read"):
        Sweep.load(file)
    file.write_text("source: [")
    with pytest.raises(UserError, match="not valid YAML"):
        Sweep.load(file)
    file.write_text("- source")
    with pytest.raises(UserError, match="keys and values"):
        Sweep.load(file)


@pytest.mark.parametrize("file", sorted((ROOT / "launch" / "experiments").glob("*.yaml")))
def test_the_experiments_are_sound(file):
    assert len(Sweep.load(file).runs) > 1


def test_what_has_become_of_runs(tmp_path):
    """Read from the run directories and the jobs alone: another process may ask."""
    sweep = Sweep(description(tmp_path, executor="local", grid={"seed": [1, 2, 3]}))
    result = {
        "accuracy": {"personal": 0.9, "global": 0.8}, "best": None, "samples": 7,
        "bytes": {"up": 2e6}, "seconds": {"total": 3.0},
    }  # fmt: skip
    (tmp_path / "seed=1").mkdir()
    (tmp_path / "seed=1" / "summary.json").write_text(json.dumps(result))
    (tmp_path / "seed=2" / "checkpoint").mkdir(parents=True)
    (tmp_path / "seed=2" / "checkpoint" / "manifest.json").write_text('{"rounds": 4}')
    gone = {"job": "999999999", "executor": "local"}
    (tmp_path / "jobs.json").write_text(json.dumps({"seed=1": gone, "seed=2": gone}))
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "999999999_0_log.err").write_text(
        "hpcfed: no such task.\nsubmitit ERROR\n"
    )
    one, two, three = sweep.status()
    assert (one.state, two.state, three.state) == ("complete", "failed", "new")
    assert two.rounds == 4 and two.log == ["hpcfed: no such task."]
    assert sweep.rows()[0] == {
        "run": "seed=1", "seed": 1, "state": "complete", "personal": 0.9, "global": 0.8,
        "best round": None, "samples": 7, "MB up": 2.0, "seconds": 3.0,
    }  # fmt: skip
    lines = sweep.table().splitlines()
    assert len(lines) == 5 and len({len(line) for line in lines}) == 1
    assert "| seed=3 | 3" in lines[4]


def test_runs_of_a_job_array_of_ones_own(tmp_path):
    """What this sweep did not submit: seen by its run directory."""
    sweep = Sweep(description(tmp_path, grid={"seed": [1, 2]}))
    (tmp_path / "seed=1" / "checkpoint").mkdir(parents=True)
    (tmp_path / "seed=1" / "checkpoint" / "manifest.json").write_text('{"rounds": 0}')
    assert [own.state for own in sweep.status()] == ["begun", "new"]


def test_no_slurm_is_said_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"no srun here.*--executor local"):
        Sweep(description(tmp_path)).submit()


@pytest.mark.parametrize(
    ("variable", "arguments", "srun"),
    [
        ("", [], "--mpi=pmix"),
        ("cray_shasta", ["--kill-on-bad-exit=1"], "--mpi=cray_shasta --kill-on-bad-exit=1"),
        ("pmi2", ["--mpi=pmix_v4"], "--mpi=pmix_v4"),
    ],
)
def test_the_kind_of_mpi(tmp_path, monkeypatch, variable, arguments, srun):
    monkeypatch.setattr("shutil.which", lambda name, *rest, **more: f"/usr/bin/{name}")
    monkeypatch.setenv("MPI_TYPE", variable)
    cluster = {"slurm_srun_args": arguments} if arguments else {}
    executor = Sweep(description(tmp_path, cluster=cluster)).jobs.make_executor()
    text = executor._executor._make_submission_file_text("COMMAND", "UID")
    assert text.rstrip().endswith(f".err {srun} COMMAND")
    monkeypatch.setenv("MPI_TYPE", "pmix; reboot")
    if not any(word.startswith("--mpi") for word in arguments):
        with pytest.raises(UserError, match="MPI_TYPE is 'pmix; reboot'"):
            Sweep(description(tmp_path, cluster=cluster)).jobs.make_executor()


def test_the_sbatch_text(tmp_path, monkeypatch):
    """What submitit makes of a description, against a golden file."""
    monkeypatch.setattr("shutil.which", lambda name, *rest, **more: f"/usr/bin/{name}")
    tree = yaml.safe_load((ROOT / "launch" / "experiments" / "llama-7b.yaml").read_text())
    sweep = Sweep({**tree, "folder": str(tmp_path / "llama-7b")})
    executor = sweep.jobs.make_executor()
    text = executor._executor._make_submission_file_text("COMMAND", "UID")
    text = text.replace(str(tmp_path), "FOLDER")
    assert re.sub(r"\n+$", "\n", text) == GOLDEN.read_text()


def test_a_method_of_ones_own_in_a_grid(tmp_path):
    """As docs/add-a-method.md says: beside ours, by the name of its file."""
    documented.write(tmp_path)
    own = str(tmp_path / "mine.yaml")
    sweep = Sweep(description(tmp_path, grid={"method": [own, "fedsa-lora"]}))
    first, second = (resolve(line[0], line[1:]).config for line in map(sweep.line, range(2)))
    assert (first.sharing.rule, second.sharing.rule) == ("only-a", "fedsa")
    assert first.plugins == (str(tmp_path / "my_method.py"),)
