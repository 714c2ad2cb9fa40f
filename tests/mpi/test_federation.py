"""Whole runs as a user starts them: `hpcfed run` on real MPI ranks."""

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from tests import models
from tests.mpi.variants import ROWS, overrides, write_data
from tests.support import many_runs, mpiexec


def run(ranks, out, *extra, code=0):
    """`hpcfed run lora-fedavg` on the small data in `out`; its printed output."""
    words = [*overrides(out, "sgd"), *extra]
    return mpiexec(ranks, "hpcfed", "run", "lora-fedavg", *words, code=code)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("data")
    write_data(out)
    return out


def test_architectures_under_zero3(data, tmp_path):
    """Sharded at load, trained, and the gathered adapter is a PEFT folder that is not empty."""
    runs = {}
    for architecture, (_, _, _, targets) in models.ARCHITECTURES.items():
        folder = models.save(architecture, tmp_path / f"model-{architecture}")
        runs[architecture] = [
            *overrides(data, "sgd", "zero3"), f"model.name={folder}", "federation.rounds=1",
            f"adapter.targets=[{','.join(targets)}]", "local.micro_batch=2",
        ]  # fmt: skip
    many_runs(tmp_path, 1, 2, runs)
    for architecture in runs:
        out = tmp_path / architecture
        summary = json.loads((out / "summary.json").read_text())
        assert summary["failures"] == 0 and summary["samples"] > 0
        labels = json.loads((out / "adapter" / "labels.json").read_text())
        base = AutoModelForSequenceClassification.from_pretrained(
            tmp_path / f"model-{architecture}", num_labels=len(labels)
        )
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
    small = 1 + 3 * 6 + 2 * 2 + 2
    assert rounds[0]["bytes"]["wire"] == (values + small) * 8 * 2 + values * 4
    assert summary["accuracy"]["personal"] == summary["accuracy"]["global"]
    assert set(summary["seconds"]) == {
        "init", "select", "score", "train", "exchange", "evaluate", "total",
    }  # fmt: skip
    table = json.loads((out / "partition.json").read_text())
    assert np.array(table["train"]).sum() + np.array(table["validation"]).sum() == ROWS


def test_personal_layers_stay_home(data, tmp_path):
    """Half of the layers shared: the others' values live in client files, never on the wire; and
    the result has the same bits on 1 and 2 slots."""
    shared, metrics, states = [], [], []
    for ranks in (1, 2):
        out = tmp_path / f"run{ranks}"
        run(ranks, data, f"output={out}", "layers.score=last", "layers.keep=0.5",
            "data.validation=0.2", "evaluation.every=1", "local.lr=0.05")  # fmt: skip
        shared.append(load_file(out / "adapter" / "adapter_model.safetensors"))
        metrics.append(lines(out))
        files = sorted((out / "clients").rglob("personal-*.safetensors"))
        states.append({p.relative_to(out): load_file(p)["values"] for p in files})
        values = json.loads((out / "run.json").read_text())["adapter_values"]
        packed = sum(values[block] for block in ("3", "4", "5", "head"))
        line = metrics[-1][0]
        assert line["shared_layers"] == ["3", "4", "5"]
        assert line["bytes"]["up"] == 3 * packed * 4
        small = 1 + 3 * 6 + 2 * 2 + 2
        assert line["bytes"]["wire"] == ((packed + small) * 16 + packed * 4 if ranks == 2 else 0)
    assert states[0].keys() == states[1].keys()
    assert {len(values) for values in states[0].values()} == {sum(values[b] for b in "012")}
    for one, two in ((shared[0], shared[1]), (states[0], states[1])):
        assert all(torch.equal(one[name], two[name]) for name in one)
    for one, two in zip(*metrics, strict=True):
        assert one["validation"] == two["validation"]
        assert one["train_loss"] == two["train_loss"]
    personal, whole = (metrics[0][-1]["validation"][name] for name in ("personal", "global"))
    assert personal["loss"] != whole["loss"], "personal layers change a client's predictions"
    # Shared layers 0-2 never moved from their start, so B is still zero there.
    for name, value in shared[0].items():
        if "lora_B" in name:
            assert bool(value.any()) == (name.split(".layer.")[1][0] in "345")


@pytest.mark.parametrize("ranks", [2, 4])
def test_failing_clients_cost_only_their_own_update(ranks, data):
    assert "faults: ok" in mpiexec(ranks, "faults.py", str(data), "2")


def test_real_data_on_two_slots(datasets_folder, tmp_path):
    out = tmp_path / "run"
    mpiexec(
        2, "hpcfed", "run", "lora-fedavg", f"data.root={datasets_folder}", "task.name=trec",
        "task.max_train=500", "federation.clients=10", "federation.per_round=5",
        "federation.rounds=6", "evaluation.every=3", "cluster.threads=1", f"output={out}",
    )  # fmt: skip
    summary = json.loads((out / "summary.json").read_text())
    assert summary["accuracy"]["personal"] > summary["majority"] + 0.2
