"""Federated prompts that are made of each text equal a plain loop; what travels, what it costs."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hpcfed.settings.resolve import resolve
from tests.mpi.reference_sharing import Loop
from tests.mpi.variants import COMMON, learn
from tests.pairwise import pairwise

PRESETS = ["idpg", "lpt", "attempt"]
FACTORS: dict[str, list[Any]] = {
    "shape": [(1, 1), (2, 1), (4, 1), (1, 2)],
    "preset": PRESETS,
    "stage": ["zero0", "zero1", "zero2", "zero3"],
}
FEW = [((1, 1), "idpg", "zero3"), ((2, 1), "lpt", "zero1"), ((1, 2), "idpg", "zero2"),
       ((1, 2), "lpt", "zero3"),
       ((1, 1), "attempt", "zero0"), ((1, 2), "attempt", "zero3")]  # fmt: skip
MANY = [case for case in pairwise(FACTORS) if case not in FEW]


@pytest.fixture
def given(data, once):
    """given(preset): what else it needs. Sources as PEFT saves them."""

    def make():
        for number in range(2):
            folder = data / f"source-{number}"
            folder.mkdir()
            (folder / "adapter_config.json").write_text("{}")
            drawn = torch.randn((3, 32), generator=torch.Generator().manual_seed(number)) * 3
            save_file({"prompt_embeddings": drawn}, folder / "adapter_model.safetensors")
        return f"adapter.sources=[{data}/source-0,{data}/source-1]"

    def get(preset):
        return [once("sources", make)] if preset == "attempt" else []

    return get


def overrides(data, stage="zero0"):
    return [
        *COMMON, "local.optimizer=sgd", "local.lr=0.5", "local.clip=1.0", "adapter.reduction=4",
        "adapter.virtual_tokens=3", f"model.name={data}/bert-classifier", f"data.root={data}",
        f"deepspeed=ds_configs/{stage}.json",
    ]  # fmt: skip


def check(worlds, data, once, given, folder, shape, preset, stage):
    config = resolve(preset, [*overrides(data), *given(preset)]).config
    loop = once(f"generated-{preset}", lambda: Loop("all", config).run())
    found = worlds.call(
        shape, "tests.mpi.cases.runs:federate", folder=folder,
        runs={"run": [*overrides(data, stage), *given(preset)]}, preset=preset,
    )  # fmt: skip
    start, wanted = loop.initial.numpy(), loop.values.numpy()
    for entry in loop.layout.entries:
        own = entry.values
        moved, reference = found[0]["run"]["values"][own] - start[own], wanted[own] - start[own]
        assert np.linalg.norm(reference) > 1e-4, f"{entry.name} did not move"
        difference = np.linalg.norm(moved - reference) / np.linalg.norm(reference)
        assert difference <= 2e-5, f"{entry.name}: {difference:.2e}"
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    labels = len(json.loads((folder / "run" / "run.json").read_text())["labels"])
    # Of a model of width 32: to 8, and to 3 virtual tokens.
    network, head = 32 * 8 + 8 + 8 * 96 + 96, 32 * labels + labels
    if preset == "attempt":  # the sources do not travel
        network = 3 * 32 + 2 * 32 * 8
    for line in map(json.loads, lines):
        assert line["values"]["up"] == line["values"]["down"] == 3 * (network + head)
        # A sentence vector takes a pass of its own.
        trained = line["samples"] - line["scored"]
        assert line["scored"] == (trained if preset == "idpg" else 0) and trained > 0


@pytest.mark.parametrize(("shape", "preset", "stage"), FEW)
def test_equals_the_plain_loop(worlds, data, once, given, tmp_path, shape, preset, stage):
    check(worlds, data, once, given, tmp_path, shape, preset, stage)


@pytest.mark.long
@pytest.mark.parametrize(("shape", "preset", "stage"), MANY)
def test_equals_the_plain_loop_in_full(worlds, data, once, given, tmp_path, shape, preset, stage):
    check(worlds, data, once, given, tmp_path, shape, preset, stage)


@pytest.mark.parametrize("shape", [(1, 1)])
@pytest.mark.parametrize("preset", PRESETS)
def test_goes_on(worlds, data, given, tmp_path, shape, preset):
    """With the bits of an undisturbed run; the curriculum's difficulties come from the prompts."""
    words = [
        *overrides(data), *given(preset), "data.validation=0.2", "evaluation.every=2",
        "curriculum.pace=linear", "sharing.rule=nothing",
    ]  # fmt: skip
    worlds.call(
        shape, "tests.mpi.cases.resume:check", preset=preset, words=words, folder=tmp_path,
        times=1, only=["exchange", "commit"],
    )  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("preset", ["idpg", "lpt"])
def test_learns_the_built_in_questions(tmp_path, preset):
    summary = learn(preset, tmp_path / "run")
    assert summary["accuracy"]["personal"] > summary["majority"] + 0.3
