"""Whole runs as a user starts them: `hpcfed run` on real MPI ranks."""

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from tests import models
from tests.mpi.variants import ROWS, overrides
from tests.support import latest, mpiexec


def run(ranks, out, *extra, code=0):
    """`hpcfed run lora-fedavg` on the small data in `out`; its printed output."""
    words = [*small(out, "sgd"), *extra]
    return mpiexec(ranks, "hpcfed", "run", "lora-fedavg", *words, code=code)


def small(out, variant, stage="zero0"):
    return [*overrides(out, variant, stage), f"model.name={out}/bert-classifier"]


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("shape", [(1, 2)])
@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_architectures_under_zero3(worlds, data, tmp_path, shape, architecture):
    """Sharded at load, trained, and the gathered adapter is a PEFT folder that is not empty."""
    targets = ",".join(models.ARCHITECTURES[architecture][3])
    folder = data / f"{architecture}-classifier"
    words = [
        *overrides(data, "sgd", "zero3"), f"model.name={folder}", "federation.rounds=1",
        f"adapter.targets=[{targets}]", "local.micro_batch=2",
    ]  # fmt: skip
    worlds.call(shape, "tests.mpi.cases.runs:federate", folder=tmp_path, runs={"run": words})
    out = tmp_path / "run"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["failures"] == 0 and summary["samples"] > 0
    labels = json.loads((out / "adapter" / "labels.json").read_text())
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(labels))
    PeftModel.from_pretrained(base, out / "adapter")
    values = load_file(out / "adapter" / "adapter_model.safetensors")
    lora_b = [v for n, v in values.items() if "lora_B" in n]
    assert lora_b and all(v.abs().sum() > 0 for v in lora_b)


def test_the_run_directory(data, tmp_path):
    out = tmp_path / "run"
    printed = run(2, data, f"output={out}", "data.validation=0.2", "evaluation.every=2")
    assert printed.count("round ") == 4  # 3 rounds and the best one
    names = {"adapter", "checkpoint", "config.yaml", "lock", "metrics.jsonl", "partition.json"}
    names |= {"run.json", "summary.json", "predictions.json"}
    assert {p.name for p in out.iterdir()} == names
    summary = json.loads((out / "summary.json").read_text())
    rounds = lines(out)
    assert [r["round"] for r in rounds] == [1, 2, 3]
    assert ["validation" in r for r in rounds] == [False, True, True]
    for key in ("samples", "steps"):
        assert summary[key] == sum(r[key] for r in rounds)
    for key in ("up", "down", "wire"):
        assert summary["bytes"][key] == sum(r["bytes"][key] for r in rounds)
    layout = json.loads((out / "run.json").read_text())["adapter_values"]
    values = sum(layout.values())
    assert rounds[0]["bytes"]["up"] == 3 * values * 4  # 3 clients
    assert rounds[0]["bytes"]["up_without_head"] == 3 * (values - layout["head"]) * 4
    # Two slots hand over float64 values, a weight and the statistics; then the fp32 mean.
    small = 1 + 3 * 7 + 2 * 2 + 2
    assert rounds[0]["bytes"]["wire"] == (values + small) * 8 * 2 + values * 4
    assert summary["accuracy"]["personal"] == summary["accuracy"]["global"]
    assert set(summary["seconds"]) == {
        "init", "select", "score", "train", "exchange", "evaluate", "total",
    }  # fmt: skip
    table = json.loads((out / "partition.json").read_text())
    assert np.array(table["train"]).sum() + np.array(table["validation"]).sum() == ROWS


@pytest.mark.parametrize("shape", [(1, 1), (2, 1)])
def test_personal_layers_stay_home(worlds, data, once, tmp_path, shape):
    """Half of the layers shared: the others' values live in client files, never on the wire; and
    the result has the same bits on 1 and 2 slots."""
    words = [
        *small(data, "sgd"), "layers.score=last", "layers.keep=0.5", "data.validation=0.2",
        "evaluation.every=1",
    ]  # fmt: skip
    worlds.call(shape, "tests.mpi.cases.runs:federate", folder=tmp_path, runs={"run": words})
    out = tmp_path / "run"
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    metrics = lines(out)
    files = latest((out / "clients").rglob("personal-*.safetensors"))
    states = {str(p.relative_to(out)): load_file(p)["values"] for p in files}
    values = json.loads((out / "run.json").read_text())["adapter_values"]
    packed = sum(values[block] for block in ("1", "2", "head"))
    assert metrics[0]["shared_layers"] == ["1", "2"]
    assert metrics[0]["bytes"]["up"] == 3 * packed * 4
    small_ones = 1 + 3 * 7 + 2 * 2 + 2
    wire = (packed + small_ones) * 16 + packed * 4 if shape == (2, 1) else 0
    assert metrics[0]["bytes"]["wire"] == wire
    assert {len(own) for own in states.values()} == {values["0"]}
    told = [(line["validation"], line["train_loss"]) for line in metrics]
    first = once("personal-layers", lambda: (adapter, states, told))
    assert states.keys() == first[1].keys()
    for one, two in ((adapter, first[0]), (states, first[1])):
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert told == first[2]
    personal, whole = (metrics[-1]["validation"][name] for name in ("personal", "global"))
    assert personal["loss"] != whole["loss"], "personal layers change a client's predictions"
    # What is shared of layer 0 never moved from its start, so B is still zero there.
    for name, value in adapter.items():
        if "lora_B" in name:
            assert bool(value.any()) == (name.split(".layer.")[1][0] in "12")


@pytest.mark.parametrize("shape", [(1, 2), (2, 2)])
def test_failing_clients_cost_only_their_own_update(worlds, data, tmp_path, shape):
    worlds.call(shape, "tests.mpi.cases.faults:check", out=tmp_path, data=data)


@pytest.mark.long
def test_real_data_on_two_slots(datasets_folder, tmp_path):
    out = tmp_path / "run"
    mpiexec(
        2, "hpcfed", "run", "lora-fedavg", f"data.root={datasets_folder}", "task.name=trec",
        "task.max_train=500", "federation.clients=10", "federation.per_round=5",
        "federation.rounds=6", "evaluation.every=3", "cluster.threads=1", f"output={out}",
    )  # fmt: skip
    summary = json.loads((out / "summary.json").read_text())
    assert summary["accuracy"]["personal"] > summary["majority"] + 0.2
