"""SLoRA equals a plain loop whose backbone trains under a mask; what travels in each stage, what is
exported, and what a resumed run goes on from."""

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hpcfed import model
from hpcfed.settings.resolve import resolve
from tests.mpi import variants
from tests.mpi.reference_slora import Loop
from tests.mpi.variants import COMMON, learn
from tests.same import metrics

CASES = [((1, 1), "zero0", []), ((2, 1), "zero2", ["local.micro_batch=3"]), ((1, 2), "zero3", [])]
STAGE = 2  # of 4 rounds


def overrides(data, stage="zero0"):
    return [
        *COMMON, "federation.rounds=4", "evaluation.every=4", "local.optimizer=sgd",
        "local.lr=0.5", "local.clip=1.0", "adapter.rank=4", "adapter.sparse=0.1",
        "aggregation.first_stage=0.5", f"model.name={data}/bert-classifier", f"data.root={data}",
        f"deepspeed=ds_configs/{stage}.json",
    ]  # fmt: skip


@pytest.fixture
def reference(data, once):
    def make():
        return Loop(resolve("slora", overrides(data)).config, STAGE).run()

    return lambda: once("slora", make)


def compare(values, labels, config, loop):
    """LoRA and head; nothing sparse is left."""
    layout = model.outline(config, labels, 0).layout
    assert not values[layout.roles("sparse").mask().numpy()].any()
    own = {entry.name: values[entry.values] for entry in layout.entries}
    for entry in loop.layout.entries:
        start, wanted = (v[entry.values].numpy() for v in (loop.initial, loop.values))
        reference, moved = wanted - start, own[entry.name] - start
        assert np.linalg.norm(reference) > 1e-3, f"{entry.name} did not move"
        difference = np.linalg.norm(moved - reference) / np.linalg.norm(reference)
        assert difference <= 2e-4, f"{entry.name}: {difference:.2e}"  # directions turn rounding


@pytest.mark.parametrize(("shape", "stage", "extra"), CASES)
def test_equals_the_plain_loop(worlds, data, reference, tmp_path, shape, stage, extra):
    """And only what trains travels: of six matrices of 32 x 32 a tenth, then LoRA of rank 4."""
    words = [*overrides(data, stage), *extra]
    found, run = variants.federate(worlds, shape, tmp_path, words, "slora")
    labels = tuple(json.loads((run / "run.json").read_text())["labels"])
    loop = reference()
    compare(found["values"], labels, resolve("slora", overrides(data)).config, loop)
    assert all(float(own.norm()) > 1e-3 for own in loop.between.values())
    head = 33 * len(labels)
    for line in metrics(run):
        travels = 6 * (102 if line["round"] <= STAGE else 4 * 64) + head
        assert line["values"]["up"] == line["values"]["down"] == 3 * travels


@pytest.mark.parametrize("shape", [(1, 1)])
def test_the_folder_predicts_the_same(worlds, data, tmp_path, shape):
    """PEFT loads it as a LoRA like any other."""
    _, run = variants.federate(worlds, shape, tmp_path, overrides(data), "slora")
    labels = json.loads((run / "adapter" / "labels.json").read_text())
    folder = data / "bert-classifier"
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(labels))
    loaded = PeftModel.from_pretrained(base, run / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    told = []
    for row in map(json.loads, (data / "few" / "test.jsonl").read_text().splitlines()):
        inputs = tokenizer(row["text"], return_tensors="pt", truncation=True, max_length=32)
        logits = loaded(**inputs).logits
        with loaded.disable_adapter():
            assert not torch.allclose(logits, loaded(**inputs).logits, atol=1e-3)
        told.append(int(logits.argmax()))
    predictions = json.loads((run / "predictions.json").read_text())
    assert [told[row] for row in predictions["row"]] == predictions["global"]


@pytest.mark.parametrize("shape", [(1, 1)])
def test_goes_on_with_the_same_bits(worlds, data, tmp_path, shape):
    words = [*overrides(data), "data.validation=0.2", "evaluation.every=2"]
    worlds.call(
        shape, "tests.mpi.cases.resume:check", preset="slora", words=words, folder=tmp_path,
        times=1, only=["exchange", "commit"],
    )  # fmt: skip


@pytest.mark.long
def test_learns_the_built_in_questions(tmp_path):
    summary = learn("slora", tmp_path / "run")
    assert summary["accuracy"]["personal"] > summary["majority"] + 0.3
