"""hpcfed.run: in a process that goes on, in a world of several ranks, and with ranks of its own."""

import csv
import json
import subprocess
import sys

import pandas
import pytest
import yaml
from safetensors.torch import load_file

import hpcfed
from tests.mpi.variants import COMMON
from tests.same import metrics
from tests.support import ROOT

CASES = "tests.mpi.cases.api"
EXAMPLE = ROOT / "examples" / "compare_methods.py"


def overrides(data, **more):
    """As a mapping."""
    pairs = (word.split("=", 1) for word in [*COMMON, "federation.rounds=2"])
    own = {key: yaml.safe_load(value) for key, value in pairs}
    return {**own, "data.root": data, "model.name": str(data / "bert-classifier"), **more}


@pytest.mark.parametrize("shape", [(1, 1), (2, 1)])
def test_twice_in_one_process(worlds, data, once, tmp_path, shape):
    """Different seeds differ, equal ones have the same bits; every rank gets the result."""
    runs = [
        overrides(data, seed=seed, output=tmp_path / name)
        for name, seed in (("one", 1), ("two", 2), ("again", 1))
    ]
    ranks = worlds.call(shape, f"{CASES}:runs", source="lora-fedavg", runs=runs)
    assert all(found == ranks[0] for found in ranks)
    one, two, again = ranks[0]
    for result, name in zip(ranks[0], ("one", "two", "again"), strict=True):
        assert result == hpcfed.Result.read(tmp_path / name)
        assert [line["round"] for line in result.metrics] == [1, 2]
        assert result.summary["rounds"] == 2
    table = pandas.json_normalize(one.metrics)
    assert list(table["round"]) == [1, 2] and (table["bytes.up"] > 0).all()
    assert metrics(one.path) == metrics(again.path) != metrics(two.path)
    adapters = [
        {k: v.tolist() for k, v in load_file(r.path / "adapter/adapter_model.safetensors").items()}
        for r in (one, two, again)
    ]
    assert adapters[0] == adapters[2] != adapters[1]
    assert once("api", lambda: metrics(one.path)) == metrics(one.path)


@pytest.mark.parametrize("shape", [(1, 1)])
def test_it_goes_on_after_an_interrupt_in_the_same_process(worlds, data, tmp_path, shape):
    zero3 = {"deepspeed": "ds_configs/zero3.json", "federation.rounds": 3}
    own = overrides(data, output=tmp_path / "struck", **zero3)
    (result,) = worlds.call(
        shape, f"{CASES}:interrupted", source="lora-fedavg", overrides=own, forwards=9
    )
    lives = json.loads((result.path / "run.json").read_text())["lives"]
    assert [life["rounds_done"] for life in lives] in ([0, 1], [0, 2])
    whole = overrides(data, output=tmp_path / "whole", **zero3)
    worlds.call(shape, f"{CASES}:runs", source="lora-fedavg", runs=[whole])
    assert metrics(result.path) == metrics(tmp_path / "whole")


@pytest.mark.parametrize("shape", [(2, 1)])
@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"federation.per_round": 9}, "per_round is 9"),
        ({"adapter.targets": ["q_proj"]}, "legal targets"),
        ({"cluster.ranks_per_client": 4}, "2 MPI ranks do not divide"),
    ],
)
def test_what_the_user_can_mend_is_raised_on_all_ranks(worlds, data, tmp_path, shape, more, words):
    own = overrides(data, output=tmp_path / "run", **more)
    for said, printed in worlds.call(
        shape, f"{CASES}:refused", source="lora-fedavg", overrides=own
    ):
        assert words in said and "hpcfed: " not in printed
    assert not (tmp_path / "run").exists()


def test_with_ranks_of_its_own(data, tmp_path, capfd):
    own = overrides(data, output=tmp_path / "run")
    result = hpcfed.run("lora-fedavg", own, ranks=2)
    assert result.summary["rounds"] == 2 and "2 ranks = 2 slots" in capfd.readouterr().out
    lives = json.loads((result.path / "run.json").read_text())["lives"]
    assert [life["ranks"] for life in lives] == [2]
    assert hpcfed.run("lora-fedavg", own, ranks=2, resume=True) == result


# The example.


@pytest.mark.parametrize("shape", [(1, 1)])
def test_two_methods_are_compared(worlds, data, tmp_path, shape):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "compare"
    small = overrides(data, **{"data.validation": 0.2, "evaluation.every": 1})
    (printed,) = worlds.call(
        shape, f"{CASES}:script", file=EXAMPLE, overrides=small,
        words=["--ranks=0", f"--folder={folder}"],
    )  # fmt: skip
    with (folder / "rounds.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    methods = ["lora-fedavg", "fedsa-lora"]
    assert [row["method"] for row in rows] == [name for name in methods for _ in range(2)]
    for name in methods:
        lines = hpcfed.Result.read(folder / name).metrics
        own = [row for row in rows if row["method"] == name]
        assert [row["validation"] for row in own] == [
            str(line["validation"]["personal"]["score"]) for line in lines
        ]
        sent = sum(line["bytes"]["up"] for line in lines) / 1e6
        assert float(own[-1]["MB up"]) == pytest.approx(sent)
    table = [line.split() for line in printed.splitlines()]
    head = table.index(["method", "round", "loss", "validation", "MB", "up", "seconds"])
    assert [line[0] for line in table[head + 1 : head + 5]] == [row["method"] for row in rows]
    assert (folder / "report.html").stat().st_size > 1000


@pytest.mark.long
def test_two_methods_are_compared_as_it_stands(tmp_path):
    line = [sys.executable, str(EXAMPLE), f"--folder={tmp_path}/compare", "federation.rounds=2"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "fedsa-lora: test score" in done.stdout
