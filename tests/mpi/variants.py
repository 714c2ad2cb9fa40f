"""The configurations of the equivalence test: MiniLM, dropout off, 3 rounds, ragged batches."""

import json
from pathlib import Path

import numpy as np

from hpcfed.data import corpus
from tests.support import MODEL, mpiexec

STAGES = ("zero0", "zero1", "zero2", "zero3", "offload")

COMMON = [
    f"model.name={MODEL}", "model.dropout=0", "task.name=few", "task.max_length=32", "seed=352",
    "data.validation=0", "federation.clients=4", "federation.per_round=3", "federation.rounds=3",
    "local.epochs=1", "local.batch_size=8", "evaluation.every=3", "evaluation.batch_size=256",
    "cluster.threads=1",
]  # fmt: skip

ROWS = 34  # of training

VARIANTS = {
    "sgd": ["local.optimizer=sgd", "local.lr=0.5", "local.clip=1.0"],
    "decay": ["local.optimizer=sgd", "local.lr=0.5", "local.clip=0", "local.weight_decay=0.01"],
    "adamw": ["local.optimizer=adamw", "local.lr=1e-3", "local.weight_decay=0.01"],
    "accumulate": ["local.optimizer=sgd", "local.lr=0.5", "local.micro_batch=3"],
    "accumulate-adamw": ["local.optimizer=adamw", "local.lr=1e-3", "local.micro_batch=3"],
    "dropout": ["model.dropout=0.1", "adapter.dropout=0.1"],
    "checkpointing": ["local.optimizer=sgd", "local.lr=0.5", "model.gradient_checkpointing=true"],
    "accumulate-checkpointing": [
        "local.optimizer=sgd", "local.lr=0.5", "local.micro_batch=3",
        "model.gradient_checkpointing=true",
    ],
}  # fmt: skip


def overrides(out: str | Path, name: str, stage: str = "zero0") -> list[str]:
    """Command-line overrides of a variant at a ZeRO stage; its data lies in out."""
    return [*COMMON, *VARIANTS[name], f"deepspeed=ds_configs/{stage}.json", f"data.root={out}"]


FIBECFED = [
    *COMMON, "local.optimizer=sgd", "local.lr=0.5", "local.clip=1.0", "federation.rounds=4",
    "local.batch_size=4", "local.epochs=2", "curriculum.warmup=1", "curriculum.full_at=1.0",
    "layers.keep=0.5", "sparsity.keep=0.5", "curriculum.pace=linear",
]  # fmt: skip


def federate(worlds, shape, folder, words, preset="lora-fedavg", lost=()):
    """A run in a world of this shape: what tests.mpi.cases.runs tells of it, and its directory.
    lost: (round, client) of updates that are lost."""
    found = worlds.call(
        shape, "tests.mpi.cases.runs:federate", folder=folder, runs={"run": words}, preset=preset,
        lost=lost,
    )  # fmt: skip
    return found[0]["run"], folder / "run"


def learn(preset, out):
    """summary.json of ten rounds of a preset on the built-in questions, with MiniLM, in `out`."""
    mpiexec(
        2, "hpcfed", "run", preset, f"model.name={MODEL}", "task.max_length=24",
        "federation.clients=12", "federation.per_round=4", "federation.rounds=10",
        "evaluation.every=10", "cluster.threads=1", f"output={out}",
    )  # fmt: skip
    return json.loads((out / "summary.json").read_text())


def write_data(out: Path) -> None:
    """out/few/train.jsonl and test.jsonl: a few real rows of the built-in corpus."""
    (out / "few").mkdir()
    for split, rows in zip(("train", "test"), corpus.generate(), strict=True):
        lines = [json.dumps({"text": text, "label": label}) for text, label in rows[:ROWS]]
        keep = lines if split == "train" else lines[:8]
        (out / "few" / f"{split}.jsonl").write_text("\n".join(keep) + "\n")


def write_talks(out: Path) -> None:
    """out/talks/train.jsonl and test.jsonl: prompts of very unlike lengths and their answers, some
    as conversations of two turns; `topic` says what is asked for."""
    words = "cat dog horse river forest mountain bird flower tree lake street train office".split()
    (out / "talks").mkdir()
    rng = np.random.default_rng(5)
    for split, count in (("train", ROWS), ("test", 8)):
        lines = []
        for number in range(count):
            said = list(rng.choice(words, int(rng.integers(1, 14)), replace=False))
            topic = ("first", "last", "all")[number % 3]
            answer = {"first": said[0], "last": said[-1], "all": " ".join(sorted(said))}[topic]
            row = {"prompt": f"name {topic} of {' '.join(said)}", "completion": answer}
            if number % 4 == 0:
                turns = ["name a bird", "bird", row["prompt"], row["completion"]]
                roles = ["user", "assistant"] * 2
                talk = zip(roles, turns, strict=True)
                row = {"messages": [{"role": role, "content": text} for role, text in talk]}
            lines.append(json.dumps({**row, "topic": topic, "who": f"c{number % 4}"}))
        (out / "talks" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
