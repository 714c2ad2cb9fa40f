"""Small language models, briefly trained here, learn a separable task through their own words."""

import json

import numpy as np
import pytest
import torch
import transformers

from tests import models

TOPICS = {
    "nature": "cat dog horse river forest mountain bird flower tree lake".split(),
    "city": "street train office bridge market station tower bus shop road".split(),
}
ENDS = {"nature": ["green", "great", "terrible"], "city": ["grey", "great", "terrible"]}
TEMPLATE = "{a} . It was <mask>"
STEPS, BATCH = 120, 32


def sentences(count, seed):
    """(text, topic): six words of one topic."""
    rng = np.random.default_rng(seed)
    names = [list(TOPICS)[int(i)] for i in rng.integers(0, 2, count)]
    return [(" ".join(rng.choice(TOPICS[name], 6)), name) for name in names]


def pretrain(folder, head):
    """Language modelling of such sentences, which end in a word of their topic, or in one of the
    task's words at random."""
    torch.manual_seed(0)
    auto = {
        "cloze": transformers.AutoModelForMaskedLM, "label_words": transformers.AutoModelForCausalLM
    }[head]  # fmt: skip
    model, tokenizer = (
        auto.from_pretrained(folder),
        transformers.AutoTokenizer.from_pretrained(folder),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rng = np.random.default_rng(1)
    for step in range(STEPS):
        texts = [
            TEMPLATE.replace("{a}", text).replace("<mask>", rng.choice(ENDS[topic]))
            for text, topic in sentences(BATCH, 100 + step)
        ]
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        labels = batch["input_ids"].clone()
        if head == "cloze":
            hidden = torch.from_numpy(rng.random(labels.shape) < 0.2)
            hidden[:, -2] = True  # the gap
            labels[~hidden] = -100
            batch["input_ids"][hidden] = tokenizer.mask_token_id
        else:
            labels[batch["attention_mask"] == 0] = -100
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 4, "the language model has learned nothing"
    model.save_pretrained(folder)


@pytest.mark.long
@pytest.mark.parametrize("shape", [(2, 1)])
@pytest.mark.parametrize(
    ("architecture", "head", "targets"),
    [
        ("bert", "cloze", "[query,key,value,dense]"),
        ("llama", "label_words", "[q_proj,k_proj,v_proj,o_proj,up_proj,down_proj]"),
    ],
)
def test_learns_a_separable_task(worlds, architecture, head, targets, tmp_path, shape):
    models.save(architecture, tmp_path / "model", head)
    pretrain(tmp_path / "model", head)
    (tmp_path / "topics").mkdir()
    for split, count in (("train", 240), ("test", 100)):
        rows = sentences(count, count)
        lines = [json.dumps({"text": text, "label": topic}) for text, topic in rows]
        (tmp_path / "topics" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    overrides = [
        f"model.name={tmp_path / 'model'}", f"model.head={head}", "task.name=topics",
        f"data.root={tmp_path}", f"task.template='{TEMPLATE}'", "task.max_length=32",
        "task.verbalizer={nature: great, city: terrible}", "federation.clients=8",
        "federation.per_round=4", "federation.rounds=8", "cluster.threads=1",
        f"adapter.targets={targets}", "local.lr=0.01",
    ]  # fmt: skip
    worlds.call(shape, "tests.mpi.cases.runs:federate", folder=tmp_path, runs={"run": overrides})
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["accuracy"]["personal"] >= 0.95, summary["accuracy"]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["train_loss"] for line in lines]
    assert losses[-1] < losses[0] - 0.05, losses
