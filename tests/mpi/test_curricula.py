"""Curricula on LoRA FedAvg equal a plain loop: which batches train, and how much of their texts."""

import json
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from hpcfed.settings.resolve import resolve
from tests.mpi.reference_curricula import Curricula
from tests.mpi.variants import COMMON, federate, learn
from tests.pairwise import pairwise
from tests.support import latest

PRESETS = ["voc", "se", "slw", "shortformer"]
FACTORS: dict[str, list[Any]] = {
    "shape": [(1, 1), (2, 1), (4, 1), (1, 2)],
    "preset": PRESETS,
    "stage": ["zero0", "zero1", "zero2", "zero3"],
}
FEW = [
    ((1, 1), "voc", "zero0"), ((2, 1), "se", "zero1"), ((1, 1), "shortformer", "zero2"),
    ((1, 1), "slw", "zero3"), ((1, 2), "se", "zero2"),
]  # fmt: skip
MANY = [case for case in pairwise(FACTORS) if case not in FEW]
ROUNDS = 4


def overrides(data, stage="zero0"):
    """Texts of the built-in corpus have 5 to 17 tokens: of 20 they are cut at 4 or 5 at first."""
    return [
        *COMMON, "local.optimizer=sgd", "local.lr=0.2", "local.clip=1.0", "local.batch_size=2",
        "local.epochs=2", f"federation.rounds={ROUNDS}", "curriculum.full_at=0.75",
        "task.max_length=20", f"model.name={data}/bert-classifier", f"data.root={data}",
        f"deepspeed=ds_configs/{stage}.json",
    ]  # fmt: skip


def check(worlds, data, once, folder, shape, preset, stage):
    config = resolve(preset, overrides(data)).config

    def make():
        loop = Curricula(preset, config)
        return loop.run(), loop.trained, loop.scored, loop.counted, loop.lengths

    loop, trained, scored, counted, lengths = once(f"curricula-{preset}", make)
    found, out = federate(worlds, shape, folder, overrides(data, stage), preset)
    start, wanted = loop.initial.numpy(), loop.values.numpy()
    for block in loop.layout.blocks:
        span = loop.layout.span(block)
        moved, reference = found["values"][span] - start[span], wanted[span] - start[span]
        difference = np.linalg.norm(moved - reference) / np.linalg.norm(reference)
        assert difference <= 1e-5, f"{block}: {difference:.2e}"
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["tokens"] for line in lines] == counted
    assert [line["scored"] for line in lines] == scored
    assert json.loads((out / "summary.json").read_text())["tokens"] == sum(counted)
    told = {
        (note["round"] - 1, int(history.parent.name)): note["trained"]
        for history in out.glob("clients/*/history.jsonl")
        for note in map(json.loads, history.read_text().splitlines())
    }
    assert told == trained
    if preset in ("slw", "shortformer"):
        assert [line["length"] for line in lines] == lengths
        assert all("share" not in line for line in lines) and not told
        assert lengths == {"slw": [4, 9, 14, 20], "shortformer": [5, 5, 5, 20]}[preset]
    else:
        assert all("length" not in line for line in lines)
        assert len({len(used) for used in trained.values()}) > 1, "the share never grows"
    assert (sum(scored) > 0) == (preset == "se")
    kept = {file.name.partition("-")[0] for file in latest(out.glob("clients/*/*.safetensors"))}
    assert kept == ({"curriculum"} if preset == "se" else set())


@pytest.mark.parametrize(("shape", "preset", "stage"), FEW)
def test_equals_the_plain_loop(worlds, data, once, tmp_path, shape, preset, stage):
    check(worlds, data, once, tmp_path, shape, preset, stage)


@pytest.mark.long
@pytest.mark.parametrize(("shape", "preset", "stage"), MANY)
def test_equals_the_plain_loop_in_full(worlds, data, once, tmp_path, shape, preset, stage):
    check(worlds, data, once, tmp_path, shape, preset, stage)


@pytest.mark.parametrize("shape", [(1, 1)])
@pytest.mark.parametrize("preset", ["se", "slw"])
def test_goes_on(worlds, data, tmp_path, shape, preset):
    """Struck in a round and in a commit, a run ends with the bits of one that is not."""
    words = [
        *overrides(data), "data.validation=0.2", "evaluation.every=2", "layers.score=last",
        "layers.keep=0.5",
    ]  # fmt: skip
    worlds.call(
        shape, "tests.mpi.cases.resume:check", preset=preset, words=words, folder=tmp_path,
        times=1, only=["exchange", "commit"],
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(1, 1)])
def test_what_is_sent_is_that_of_lora_fedavg(worlds, data, tmp_path, shape):
    """Texts alone are shorter: the rows that meet, the steps and the bytes are the same."""
    told = {}
    for preset in ("lora-fedavg", "shortformer"):
        words = [*overrides(data), "curriculum.full_at=1.0"]
        worlds.call(
            shape, "tests.mpi.cases.runs:federate", folder=tmp_path, runs={preset: words},
            preset=preset,
        )  # fmt: skip
        lines = (tmp_path / preset / "metrics.jsonl").read_text().splitlines()
        told[preset] = [json.loads(line) for line in lines]
    for one, two in zip(*told.values(), strict=True):
        for key in ("clients", "samples", "steps", "values"):
            assert one[key] == two[key]
        assert two["tokens"] < one["tokens"] and two["length"] == 5


@pytest.mark.long
@pytest.mark.parametrize("preset", PRESETS)
def test_learns_the_built_in_questions(tmp_path, preset):
    out = tmp_path / "run"
    summary = learn(preset, out)
    assert summary["accuracy"]["personal"] > summary["majority"] + 0.4
    assert load_file(out / "adapter" / "adapter_model.safetensors")
