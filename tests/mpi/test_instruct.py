"""Instruction tuning equals a plain loop, for every shape of the world, ZeRO stage and model."""

import json
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from hpcfed import model
from hpcfed.data import answers, rendering, sources
from hpcfed.objectives import heads
from hpcfed.objectives.completion import Completion
from hpcfed.settings.resolve import resolve
from tests import models
from tests.mpi import variants
from tests.mpi.reference import federated_average
from tests.mpi.variants import COMMON
from tests.pairwise import each, others

ARCHITECTURES = ("llama", "gpt2", "qwen3")
FACTORS: dict[str, list[Any]] = {
    "shape": [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)],
    "architecture": list(ARCHITECTURES),
    "stage": ["zero0", "zero1", "zero2", "zero3"],
    "micro_batch": ["null", "3"],
}
FEW = each({**FACTORS, "shape": [(1, 1), (2, 1), (1, 2)]})
MANY = others(FACTORS, FEW)


def overrides(data, architecture, *extra):
    targets = ",".join(models.ARCHITECTURES[architecture][3])
    return [
        *(word for word in COMMON if not word.startswith(("task.max_length", "model.name"))),
        f"model.name={data}/{architecture}-completion", "model.head=completion", "task.name=talks",
        f"data.root={data}", "task.max_length=40", f"adapter.targets=[{targets}]",
        "data.partition.kind=dirichlet", "data.partition.column=topic", "local.optimizer=sgd",
        "local.lr=0.5", "local.epochs=2", "local.max_steps=3", "local.lr_schedule=cosine",
        "local.lr_end=0.1", *extra,
    ]  # fmt: skip


def federate(worlds, shape, folder, words, preset="lora-fedavg"):
    """Final values, and the run's folder."""
    found, run = variants.federate(worlds, shape, folder, words, preset)
    return found["values"], run


def reference(config):
    layout = model.prepare(config, (), 0, {}).adapted.layout
    return (layout, *federated_average(config))


def check(worlds, once, data, tmp_path, shape, architecture, stage, micro_batch):
    """||D - Dref|| / ||Dref|| of each block, D the way from the initial values."""
    words = overrides(data, architecture)
    config = resolve("lora-fedavg", words).config
    layout, start, wanted, sizes = once(f"talks-{architecture}", lambda: reference(config))
    assert len(set(sizes)) >= 3, "batches of one size: the test shows little"
    own = [f"deepspeed=ds_configs/{stage}.json", f"local.micro_batch={micro_batch}"]
    values, _ = federate(worlds, shape, tmp_path, [*words, *own])
    for block in layout.blocks:
        span = layout.span(block)
        moved, plain = (part[span] - start.numpy()[span] for part in (values, wanted.numpy()))
        assert np.linalg.norm(plain) > 1e-3, f"block {block} did not move: it shows nothing"
        difference = np.linalg.norm(moved - plain) / np.linalg.norm(plain)
        assert difference <= 1e-5, f"block {block}: {difference:.2e}"


@pytest.mark.parametrize(("shape", "architecture", "stage", "micro_batch"), FEW)
def test_equals_the_plain_loop(
    worlds, once, data, tmp_path, shape, architecture, stage, micro_batch
):
    check(worlds, once, data, tmp_path, shape, architecture, stage, micro_batch)


@pytest.mark.long
@pytest.mark.parametrize(("shape", "architecture", "stage", "micro_batch"), MANY)
def test_equals_the_plain_loop_in_full(
    worlds, once, data, tmp_path, shape, architecture, stage, micro_batch
):
    check(worlds, once, data, tmp_path, shape, architecture, stage, micro_batch)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (4, 1)])
def test_bit_identical_for_any_number_of_slots(worlds, once, data, tmp_path, shape):
    """Each compares with the first of the three that ran; the loss is that of a plain sum."""
    values, run = federate(worlds, shape, tmp_path, overrides(data, "llama"))
    test = json.loads((run / "summary.json").read_text())["test"]["personal"]
    first = once("talks-bits", lambda: (shape, values, test))
    assert np.array_equal(values, first[1]), f"{shape} differs from {first[0]}"
    assert test == first[2]
    assert test["perplexity"] == pytest.approx(np.exp(test["loss"]))


def before(words):
    """Loss and answers of the model without an adapter, a row at a time."""
    config = resolve("lora-fedavg", words).config
    task, tokenizer = sources.load(config), model.load_tokenizer(config)
    head = heads.build(config, task, tokenizer)
    assert isinstance(head, Completion)
    tokens = head.encode(task.test, tokenizer, config.task.max_length)
    assert tokens.positions is not None
    lm = transformers.AutoModelForCausalLM.from_pretrained(config.model.name, dtype=torch.float32)
    losses, written = [], []
    for row in range(len(tokens)):
        ids = torch.from_numpy(tokens.row(row).astype(np.int64))[None]
        asked = ids[:, : tokens.positions[row]]
        with torch.no_grad():
            odds = lm(input_ids=ids).logits[0].log_softmax(-1)
            answer = lm.generate(
                input_ids=asked, attention_mask=torch.ones_like(asked), do_sample=False,
                max_new_tokens=5, eos_token_id=list(head.ends), pad_token_id=tokens.pad_id,
            )[0, asked.shape[1] :]  # fmt: skip
        places = rendering.targets(tokens, row)
        losses += [-float(odds[place - 1, ids[0, place]]) for place in places]
        written.append(head.template.text([i for i in answer.tolist() if i not in head.ends]))
    return np.mean(losses), written


@pytest.mark.parametrize(
    ("shape", "stage"),
    [((1, 1), "zero0"), ((2, 1), "zero2"), ((1, 2), "zero3"), ((1, 2), "zero1")],
)
def test_answers_are_written(worlds, once, data, tmp_path, shape, stage):
    """The same answers however rows fall to ranks, and their scores are those of the answers. With
    the model as it was before the first round they are those of transformers' own loop."""
    words = [
        *overrides(data, "llama"), "evaluation.max_new_tokens=5", "evaluation.batch_size=3",
        "evaluation.before=true",
    ]  # fmt: skip
    _, run = federate(worlds, shape, tmp_path, [*words, f"deepspeed=ds_configs/{stage}.json"])
    told = json.loads((run / "predictions.json").read_text())
    written, summary = told["personal_answers"], json.loads((run / "summary.json").read_text())
    first = once("talks-answers", lambda: written)
    assert written == first and len(written) == 8 and len(set(written)) > 1
    loss, untrained = once("talks-before", lambda: before(words))
    assert summary["before"]["loss"] == pytest.approx(loss, rel=1e-5)
    assert told["before"]["global_answers"] == untrained != written
    test = summary["test"]["personal"]
    lines = (data / "talks" / "test.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    right = [row["completion"] if "prompt" in row else row["messages"][-1]["content"]
             for row in rows]  # fmt: skip
    wanted = answers.score(written, right)
    assert {name: test[name] for name in wanted} == wanted
    assert told["right_answers"] == right
    asked = [row["prompt"] if "prompt" in row else row["messages"][-2]["content"] for row in rows]
    assert told["prompts"] == asked


def preferences(folder):
    """Overrides for DPO on rows made of those of talks."""
    lines = []
    for number in range(34):
        words = f"cat dog horse river forest {'tree lake ' * (number % 5)}".split()
        pair = (words[0], words[number % 3 + 1])
        chosen, rejected = pair if number % 2 else (" ".join(words), pair[1])
        lines.append({"prompt": f"name {number}", "chosen": chosen, "rejected": rejected})
    (folder / "pairs").mkdir()
    for split, part in (("train", lines), ("test", lines[:7])):
        text = "".join(json.dumps(line) + "\n" for line in part)
        (folder / "pairs" / f"{split}.jsonl").write_text(text)
    return [
        "model.head=dpo", "task.name=pairs", f"data.root={folder}", "data.partition.kind=iid",
        "data.partition.column=null", "local.lr=0.5",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "stage", "micro_batch"),
    [((1, 1), "zero0", "3"), ((2, 1), "zero3", "null"), ((1, 2), "zero2", "3")],
)
def test_dpo_at_every_stage(worlds, once, data, tmp_path, shape, stage, micro_batch):
    """Alike, however rows fall to ranks; and the preferred answers become likelier."""
    words = [
        *overrides(data, "llama"), *preferences(tmp_path), f"deepspeed=ds_configs/{stage}.json",
        f"local.micro_batch={micro_batch}",
    ]  # fmt: skip
    values, run = federate(worlds, shape, tmp_path, words)
    test = json.loads((run / "summary.json").read_text())["test"]["personal"]
    assert test["preference"] > 0.5 and test["loss"] < np.log(2) - 1e-3
    first, told = once("preferences", lambda: (values, test))
    assert np.linalg.norm(values - first) / np.linalg.norm(first) < 1e-5
    assert test == pytest.approx(told, rel=1e-4)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1)])
@pytest.mark.parametrize("preset", ["fibecfed", "fedpeptao"])
def test_the_two_systems_tune_on_instructions(worlds, once, data, tmp_path, shape, preset):
    """Layers by sensitivity, sparse updates, difficulties by Fisher, or deep prompts: the same
    bits on one slot and on two, and the loss on answers falls."""
    own = {
        "fibecfed": ["curriculum.warmup=1", "sparsity.keep=0.5", "federation.rounds=5"],
        "fedpeptao": ["adapter.virtual_tokens=4", "curriculum.warmup=1", "federation.rounds=5"],
    }[preset]  # fmt: skip
    words = [
        word
        for word in overrides(data, "llama")
        if not word.startswith(("local.lr", "local.optimizer", "local.max_steps"))
        and not (preset == "fedpeptao" and word.startswith("adapter.targets"))
    ]
    words = [*words, *own, "local.lr=0.02", "evaluation.every=1"]
    values, run = federate(worlds, shape, tmp_path, words, preset)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["validation"]["personal"]["loss"] for line in lines if "validation" in line]
    selection = json.loads((run / "selection.json").read_text())
    assert selection["scores"] and min(selection["scores"].values()) > 0
    trained = [line["train_loss"] for line in lines]
    assert trained[-1] < trained[0] - 0.02, trained
    first = once(f"talks-{preset}", lambda: (values, trained, losses))
    assert np.array_equal(values, first[0]) and (trained, losses) == first[1:]
