"""AdaLoRA in a federation equals a plain loop on PEFT's layers; which singular values go, what
rests and no longer travels, what is exported, and what a resumed run goes on from."""

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hpcfed.app.export import export
from hpcfed.settings.resolve import resolve
from tests.mpi import variants
from tests.mpi.reference_adalora import Loop
from tests.mpi.variants import COMMON, learn
from tests.same import metrics

ROUNDS = 4
# Of rank 4 over six matrices: after one round 13 singular values are left of 24, then 12 for good.
CASES = [((1, 1), "zero0", []), ((2, 1), "zero1", ["local.micro_batch=3"]), ((1, 2), "zero3", []),
         ((1, 2), "zero2", ["model.gradient_checkpointing=true"])]  # fmt: skip
LEFT = [24 - 10, 12, 12, 12]


def overrides(data, stage="zero0"):
    return [
        *COMMON, f"federation.rounds={ROUNDS}", "evaluation.every=4", "local.optimizer=sgd",
        "local.lr=0.5", "local.clip=1.0", "adapter.rank=4", "adapter.alpha=400",
        "aggregation.budget=2", "aggregation.prune_from=0", "aggregation.prune_to=0.5",
        f"model.name={data}/bert-classifier", f"data.root={data}",
        f"deepspeed=ds_configs/{stage}.json",
    ]  # fmt: skip


def compare(values, loop):
    for entry in loop.layout.entries:
        start, wanted = (v[entry.values].numpy() for v in (loop.initial, loop.values))
        reference, moved = wanted - start, values[entry.values] - start
        if entry.role == "Lambda":
            assert np.array_equal(values[entry.values] == 0, wanted == 0), entry.name
        if not np.any(reference):
            assert entry.role == "Lambda" and not np.any(moved)
            continue
        difference = np.linalg.norm(moved - reference) / np.linalg.norm(reference)
        assert difference <= 5e-5, f"{entry.name}: {difference:.2e}"


@pytest.fixture
def reference(data, once):
    def make():
        return Loop(resolve("adalora", overrides(data)).config).run()

    return lambda: once("adalora", make)


@pytest.mark.parametrize(("shape", "stage", "extra"), CASES)
def test_equals_the_plain_loop(worlds, data, reference, tmp_path, shape, stage, extra):
    """And what rests is neither trained nor sent; a score of each singular value is sent beside
    the values."""
    words = [*overrides(data, stage), *extra]
    found, run = variants.federate(worlds, shape, tmp_path, words, "adalora")
    loop = reference()
    compare(found["values"], loop)
    assert loop.left == LEFT
    labels = len(json.loads((run / "run.json").read_text())["labels"])
    whole, head = 24 * 65, 33 * labels
    for line, left in zip(metrics(run), LEFT, strict=True):
        assert line["singular_values"] == left
        travels = whole if line["round"] <= 2 else 12 * 65
        assert line["values"]["down"] == 3 * (travels + head)
        assert line["values"]["up"] == 3 * (travels + head + 24)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1)])
def test_bit_identical_for_any_number_of_slots(worlds, data, once, tmp_path, shape):
    """Each compares with the first of the two that ran."""
    words = [*overrides(data), "local.optimizer=adamw", "local.lr=1e-2"]
    found, run = variants.federate(worlds, shape, tmp_path, words, "adalora")
    first = once("adalora-bits", lambda: (found["values"], metrics(run)))
    assert np.array_equal(found["values"], first[0]) and metrics(run) == first[1]


@pytest.mark.parametrize("shape", [(1, 1)])
def test_the_folder_predicts_the_same(worlds, data, tmp_path, shape):
    """PEFT loads it as an AdaLoRA, and merged it needs no PEFT."""
    _, run = variants.federate(worlds, shape, tmp_path, overrides(data), "adalora")
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "ADALORA" and config["init_r"] == 4
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    singular = torch.cat([v for name, v in tensors.items() if name.endswith("lora_E")])
    assert len(singular) == 24 and int((singular != 0).sum()) == 12
    export(run, tmp_path / "merged", merge=True)
    labels = json.loads((run / "adapter" / "labels.json").read_text())
    kind, folder = AutoModelForSequenceClassification, data / "bert-classifier"
    loaded = PeftModel.from_pretrained(
        kind.from_pretrained(folder, num_labels=len(labels)), run / "adapter"
    ).eval()
    merged = kind.from_pretrained(tmp_path / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    told = []
    for row in map(json.loads, (data / "few" / "test.jsonl").read_text().splitlines()):
        inputs = tokenizer(row["text"], return_tensors="pt", truncation=True, max_length=32)
        logits = loaded(**inputs).logits
        assert torch.allclose(logits, merged(**inputs).logits, atol=1e-4)
        with loaded.disable_adapter():
            assert not torch.allclose(logits, loaded(**inputs).logits, atol=1e-3)
        told.append(int(logits.argmax()))
    predictions = json.loads((run / "predictions.json").read_text())
    assert [told[row] for row in predictions["row"]] == predictions["global"]


@pytest.mark.parametrize("shape", [(1, 1)])
def test_goes_on_with_the_same_bits(worlds, data, tmp_path, shape):
    words = [*overrides(data), "data.validation=0.2", "evaluation.every=2"]
    worlds.call(
        shape, "tests.mpi.cases.resume:check", preset="adalora", words=words, folder=tmp_path,
        times=1, only=["exchange", "commit"],
    )  # fmt: skip


@pytest.mark.long
def test_learns_the_built_in_questions(tmp_path):
    summary = learn("adalora", tmp_path / "run")
    assert summary["accuracy"]["personal"] > summary["majority"] + 0.3
