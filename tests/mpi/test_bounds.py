"""`centralized` is one training, over all rows, with one optimizer: cut into rounds."""

import itertools
import json
from functools import partial

import numpy as np
import pytest
import torch

from hpcfed import model
from hpcfed.data import partition, sources
from hpcfed.data.batches import form_batches, tokenize
from hpcfed.rng import generator
from hpcfed.settings.resolve import resolve
from tests.mpi.slow import Plain
from tests.mpi.variants import COMMON, ROWS, federate
from tests.support import MODEL, mpiexec

PRESET, ROUNDS = "centralized", 3
# 3 of 4 clients for one epoch: 25.5 of 34 rows, so that rounds end within epochs.
A_ROUND = 26
FEW = [((1, 1), "zero0"), ((1, 2), "zero2")]
MANY = [((2, 1), "zero1"), ((4, 1), "zero0"), ((1, 2), "zero3")]


def overrides(data, stage="zero0"):
    return [
        *COMMON, "local.optimizer=sgd", "local.momentum=0.9", "local.lr=0.1", "local.clip=1.0",
        f"model.name={data}/bert-classifier", f"data.root={data}",
        f"deepspeed=ds_configs/{stage}.json",
    ]  # fmt: skip


def reference(data):
    """Initial values, and those after one training over the stream."""
    config = resolve(PRESET, overrides(data)).config
    task = sources.load(config)
    tokens = tokenize(task.train, model.load_tokenizer(config), config.task.max_length)
    plain, batches = Plain(config, task.labels), []
    stream = np.concatenate([
        generator(config.seed, "stream", turn).permutation(np.arange(ROWS)) for turn in range(3)
    ])  # fmt: skip
    for number in range(ROUNDS):
        # An epoch that ends within a round ends a batch.
        first, last = number * A_ROUND, (number + 1) * A_ROUND
        inside = {end for end in range(0, 3 * ROWS, ROWS) if first < end < last}
        ends = sorted({first, last, *inside})
        for turn, (start, stop) in enumerate(itertools.pairwise(ends)):
            rng = generator(config.seed, "batches", number, 0, turn)
            batches += form_batches(stream[start:stop], tokens.lengths, 8, rng)
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    whole = torch.ones(plain.layout.size, dtype=torch.bool)
    values = plain.train(plain.initial, whole, batches, tokens, sgd, 1.0)
    return plain.layout, plain.initial.numpy(), values.numpy()


def check(worlds, data, once, folder, shape, stage):
    layout, start, wanted = once(PRESET, lambda: reference(data))
    found, out = federate(worlds, shape, folder, overrides(data, stage), PRESET)
    values = found["values"]
    for block in layout.blocks:
        span = layout.span(block)
        moved, way = values[span] - start[span], wanted[span] - start[span]
        difference = np.linalg.norm(moved - way) / np.linalg.norm(way)
        assert difference <= 2e-5, f"{block}: {difference:.2e}"
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(line["clients"], line["samples"]) for line in lines] == [([0], A_ROUND)] * ROUNDS
    table = json.loads((out / "partition.json").read_text())
    assert np.array(table["train"]).sum() == ROWS and len(table["train"]) == 1
    accuracy = json.loads((out / "summary.json").read_text())["accuracy"]
    assert accuracy["personal"] == accuracy["global"]


@pytest.mark.parametrize(("shape", "stage"), FEW)
def test_is_one_training(worlds, data, once, tmp_path, shape, stage):
    check(worlds, data, once, tmp_path, shape, stage)


@pytest.mark.long
@pytest.mark.parametrize(("shape", "stage"), MANY)
def test_is_one_training_in_full(worlds, data, once, tmp_path, shape, stage):
    check(worlds, data, once, tmp_path, shape, stage)


@pytest.mark.parametrize("shape", [(1, 1)])
def test_goes_on(worlds, data, tmp_path, shape):
    words = [
        *overrides(data), "data.validation=0.2", "evaluation.every=1", "layers.score=last",
        "layers.keep=0.5",
    ]  # fmt: skip
    worlds.call(
        shape, "tests.mpi.cases.resume:check", preset=PRESET, words=words, folder=tmp_path,
        times=1, only=["exchange", "commit"],
    )  # fmt: skip


def test_the_rows_are_those_of_the_clients(data):
    """None is lost, and validation and test rows stay what they were."""
    words = [*overrides(data), "data.validation=0.2"]
    apart, pooled = (
        partition.partition(sources.load(config), config)
        for config in (resolve(preset, words).config for preset in ("lora-fedavg", PRESET))
    )
    assert len(apart) == 4 and len(pooled) == 1
    for name in ("train", "validation", "test"):
        every = np.concatenate([getattr(rows, name) for rows in apart])
        assert np.array_equal(np.sort(every), getattr(pooled[0], name))


@pytest.mark.long
def test_learns_the_built_in_questions(tmp_path):
    out = tmp_path / "run"
    mpiexec(
        1, "hpcfed", "run", PRESET, f"model.name={MODEL}", "task.max_length=24",
        "federation.clients=12", "federation.per_round=4", "federation.rounds=10",
        "evaluation.every=10", "cluster.threads=1", f"output={out}",
    )  # fmt: skip
    summary = json.loads((out / "summary.json").read_text())
    assert summary["accuracy"]["personal"] > summary["majority"] + 0.5
