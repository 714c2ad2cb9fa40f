"""A run directory that is damaged is refused in a sentence that names the file, and left as it is;
where the commit before is whole, the run goes on from that."""

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.mpi.test_errors import sentence
from tests.mpi.test_resume import METHOD, ROUNDS, life
from tests.same import assert_same
from tests.unit import wrong_folders
from tests.unit.wrong_folders import CASES, MANIFEST, NAMES, TENSORS

SHAPE = pytest.mark.parametrize("shape", [(1, 1)])
# Those that spoil what the run was made from, and not the run.
OF_DATA = NAMES[NAMES.index("other texts in the training rows") :]
COMMAND = "tests.mpi.cases.runs:command_line"


def words(folder):
    return [*METHOD, "local.control=true", "server.control=false", f"data.root={folder}/data",
            f"model.name={folder}/data/model", f"output={folder}/run"]  # fmt: skip


@pytest.fixture(scope="session")
def wrong(worlds, data, common, once):
    """A place where runs are spoiled; beside it, `stopped`: a run after 2 of 5 rounds and what it
    was made from, and `whole`: the same run, undisturbed."""
    place = common / "wrong" / "here"

    def make():
        place.mkdir(parents=True)
        shutil.copytree(data / "few", place / "data" / "few")
        shutil.copytree(data / "bert-classifier", place / "data" / "model")
        run = ["lora-fedavg", *words(place)]
        worlds.call((1, 1), "tests.mpi.cases.runs:federate", folder=place, runs={"run": run[1:]})
        shutil.move(place / "run", place.with_name("whole"))
        worlds.call(
            (1, 1), "tests.mpi.cases.resume:command", words=["run", *run, "--no-live"],
            strike=("sweep", 1, 0, "SIGUSR2"),
        )  # fmt: skip
        assert json.loads((place / MANIFEST).read_text())["rounds"] == 2
        shutil.copytree(place, place.with_name("stopped"))
        return True

    once("wrong-folders", make)
    return place


def fresh(wrong, alone=True, part="run"):
    """The stopped run again; alone: without the commit before the last one."""
    shutil.rmtree(wrong / part)
    shutil.copytree(wrong.with_name("stopped") / part, wrong / part)
    if alone:
        (wrong / "run/checkpoint/previous.json").unlink()
        (wrong / "run/checkpoint/round-00001.safetensors").unlink()


def resume(worlds, shape, place, *extra):
    """(code, what was printed, what was complained of) of a life."""
    line = ["run", "lora-fedavg", *words(place), *extra, "--resume", "--no-live"]
    (told,) = worlds.call(shape, COMMAND, words=line)
    return told


def content(folder: Path):
    """Of all files, and what stands beside them."""
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@SHAPE
@pytest.mark.parametrize("name", NAMES)
def test_damaged(worlds, wrong, shape, name):
    spoil, said = next((spoil, said) for own, spoil, said in CASES if own == name)
    fresh(wrong)
    spoil(wrong)
    before = content(wrong / "run")
    code, _, problem = resume(worlds, shape, wrong)
    assert code == 2, problem
    assert re.search(said, sentence(problem)), problem
    assert problem.count("\n") == 1 and str(wrong) in problem
    assert content(wrong / "run") == before
    if name in OF_DATA:
        fresh(wrong, part="data", alone=False)


def some(names, *quick):
    """All of them; those that are not quick are long."""
    return [own if own in quick else pytest.param(own, marks=pytest.mark.long) for own in names]


LAST = {
    "manifest": wrong_folders.written(MANIFEST, "garbage"),
    "no-manifest": wrong_folders.removed(MANIFEST),
    "rounds": wrong_folders.replaced(MANIFEST, '"rounds": 2', '"rounds": 3'),
    "tensors": wrong_folders.flipped(TENSORS),
    "metrics": wrong_folders.cut("run/metrics.jsonl", 0.9),
    "client": wrong_folders.of_client("personal", wrong_folders.flipped),
    "selection": wrong_folders.removed("run/selection.json"),
}


@SHAPE
@pytest.mark.parametrize("name", some(LAST, "manifest", "metrics", "client"))
def test_the_commit_before_is_used(worlds, wrong, shape, name):
    """Only the last one is damaged: the run goes on from the one before, says so, and ends with the
    same bits."""
    fresh(wrong, alone=False)
    LAST[name](wrong)
    code, printed, problem = resume(worlds, shape, wrong)
    assert code == 0, problem
    assert "the run goes on from the commit before, of round 1" in sentence(problem)
    assert "goes on after round 1" in printed
    assert_same(wrong.with_name("whole"), wrong / "run")


@SHAPE
def test_foreign_files_are_left_alone(worlds, wrong, shape):
    """Only what a run has written, by its name, is removed."""
    fresh(wrong)
    strays = ["clients/notes.txt", "clients/000000/notes.txt", "clients/000000/a.tmp", "mine.tmp",
              "clients/mine/personal-00000.safetensors", "checkpoint/round-mine.safetensors",
              "checkpoint/other.json", "clients/000000/personal-00000.safetensors.bak"]  # fmt: skip
    left = ["clients/000000/personal-00007.safetensors", "checkpoint/round-00007.safetensors",
            "checkpoint/manifest.json.tmp", "clients/000000/moments-00002.safetensors.tmp",
            "metrics.jsonl.tmp"]  # fmt: skip
    for name in (*strays, *left):
        (wrong / "run" / name).parent.mkdir(exist_ok=True)
        (wrong / "run" / name).write_text("something")
    code, _, problem = resume(worlds, shape, wrong)
    assert code == 0, problem
    for name in strays:
        assert (wrong / "run" / name).read_text() == "something"
        (wrong / "run" / name).unlink()
    (wrong / "run" / "clients" / "mine").rmdir()
    assert_same(wrong.with_name("whole"), wrong / "run")


@SHAPE
@pytest.mark.parametrize("summary", ["garbage", "[]", "{}", '{"rounds": 5}', ""])
def test_a_garbage_summary_is_not_complete(worlds, wrong, shape, summary):
    """The run goes on, here from its last round, and writes the summary again."""
    shutil.rmtree(wrong / "run")
    shutil.copytree(wrong.with_name("whole"), wrong / "run")
    (wrong / "run" / "summary.json").write_text(summary)
    code, printed, problem = resume(worlds, shape, wrong)
    assert code == 0 and "is complete" not in printed, problem
    assert f"goes on after round {ROUNDS}" in printed
    assert_same(wrong.with_name("whole"), wrong / "run")
    assert "is complete" in resume(worlds, shape, wrong)[1]


@SHAPE
def test_rounds_may_grow(worlds, wrong, data, tmp_path, shape):
    """A complete run gets more, and ends like one that was to have them from the start; an
    interrupted one too; not where a round depends on how many there are."""
    common = [*words(wrong), "curriculum.pace=all"]
    runs = {"whole": [*common, "federation.rounds=4"]}
    worlds.call(shape, "tests.mpi.cases.runs:federate", folder=tmp_path, runs=runs)
    grown = [*common, f"output={tmp_path}/grown"]
    for rounds, goes_on in ((2, 0), (4, 2)):
        line = ["run", "lora-fedavg", *grown, f"federation.rounds={rounds}", "--resume"]
        ((code, printed, problem),) = worlds.call(shape, COMMAND, words=[*line, "--no-live"])
        assert code == 0, problem
        assert (f"goes on after round {goes_on}" in printed) == bool(goes_on)
    assert_same(tmp_path / "whole", tmp_path / "grown")
    assert "rounds: 4 " in (tmp_path / "grown" / "config.yaml").read_text()
    for extra, said in (
        (["federation.rounds=3"], r"federation\.rounds=4, not 3; it may get more rounds, not"),
        (["federation.rounds=9", "local.lr=1"], r"began with local\.lr="),
    ):
        line = ["run", "lora-fedavg", *grown, "federation.rounds=4", *extra, "--resume"]
        ((code, _, problem),) = worlds.call(shape, COMMAND, words=line)
        assert code == 2 and re.search(said, sentence(problem)), problem
    fresh(wrong)
    before = content(wrong / "run")
    code, _, problem = resume(worlds, shape, wrong, f"federation.rounds={ROUNDS + 1}")
    assert code == 2 and "with curriculum.pace=linear each round depends" in sentence(problem)
    assert content(wrong / "run") == before


FULL = {
    "manifest.json": 1, "round-N.safetensors": 2, "metrics.jsonl": 1, "history.jsonl": 2,
    "moments-N.safetensors": 1, "adapter_model.safetensors": 1,
}  # fmt: skip


@SHAPE
@pytest.mark.parametrize("file", some(FULL, "manifest.json", "metrics.jsonl", "history.jsonl"))
def test_a_full_disk(worlds, wrong, shape, file):
    """One sentence with disk, path and what to do, and again while it is full; with room the run
    ends with the same bits."""
    fresh(wrong)
    line = ["run", "lora-fedavg", *words(wrong), "--resume", "--no-live"]
    full = "tests.mpi.cases.resume:full"
    ((code, printed),) = worlds.call(shape, full, words=line, file=file, count=FULL[file])
    said = sentence(printed)
    assert code == 2 and "The disk is full (No space left on device)" in said
    name = re.escape(file).replace("N", r"\d+")
    assert re.search(rf"{re.escape(str(wrong))}/run/.*{name} cannot be written", said), said
    assert re.search(r"make room on /\S*, and go on with --resume: what is committed", said)
    ((code, printed),) = worlds.call(shape, full, words=line, file="run.json", count=1)
    assert code == 2 and "run.json cannot be written; make room" in sentence(printed)
    assert "--resume" in sentence(printed)
    assert not list((wrong / "run").rglob("*.tmp"))
    assert life(worlds, shape, wrong / "data", wrong / "run", *words(wrong), "--resume")
    assert_same(wrong.with_name("whole"), wrong / "run")
