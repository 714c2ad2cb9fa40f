"""DP-FedAvg and DP-SGD equal plain loops, on any number of slots, and after a resumption."""

import json

import numpy as np
import pytest

from hpcfed.settings.resolve import resolve
from tests.mpi.reference_dpsgd import private_descent
from tests.mpi.reference_privacy import private_average
from tests.mpi.variants import COMMON, federate
from tests.same import kept, metrics


def overrides(data, *more):
    return [
        *COMMON, "local.optimizer=sgd", "local.lr=0.5", "local.clip=1.0", "federation.rounds=4",
        "federation.per_round=1", "privacy.noise=0.7", "privacy.clip=0.05", "privacy.secret=false",
        "seed=1",
        f"model.name={data}/bert-classifier", f"data.root={data}", *more,
    ]  # fmt: skip


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (4, 1), (1, 2)])
def test_equals_the_plain_loop(worlds, once, data, tmp_path, shape):
    """Poisson sampling, clipping, a fixed denominator, noise once: rounds with one client, with
    several and, among these four, with none; and the same bits on 1, 2 and 4 slots."""
    words = overrides(data)
    config = resolve("lora-fedavg", words).config
    wanted, sampled, norms = once("private", lambda: private_average(config))
    assert {len(own) for own in sampled} > {0, 1}, sampled
    assert max(norms) > 0.05, "nothing was clipped: the test shows nothing"
    found, run = federate(worlds, shape, tmp_path, words)
    records = lines(run)
    assert [record["clients"] for record in records] == sampled
    moved = found["values"] - found["initial"]
    reference = wanted.numpy() - found["initial"]
    assert np.linalg.norm(moved - reference) <= 1e-5 * np.linalg.norm(reference)
    if shape[1] == 1:
        now = (found["values"], kept(run), metrics(run))
        first = once("private-bits", lambda: now)
        assert np.array_equal(now[0], first[0]) and now[1:] == first[1:]
    spent = [record["privacy"]["epsilon"] for record in records]
    assert spent == sorted(spent) and len(set(spent)) == 4
    summary = json.loads((run / "summary.json").read_text())["privacy"]
    assert summary["epsilon"] == spent[-1] and summary["secret"] is False


@pytest.mark.parametrize("shape", [(2, 1)])
@pytest.mark.parametrize(
    "preset",
    ["dp-fibecfed",
     *(pytest.param(p, marks=pytest.mark.long) for p in ("dp-fedpeptao", "dp-ffa-lora"))],
)  # fmt: skip
def test_methods_run_with_it(worlds, data, tmp_path, shape, preset):
    """With adaptive clipping, whose norm moves."""
    words = overrides(
        data, "privacy.clip=adaptive", "privacy.epsilon=100", "federation.per_round=2",
        "local.lr=0.05", "local.weight_decay=0.0",
    )  # fmt: skip
    if preset != "dp-ffa-lora":
        words.append("curriculum.warmup=1")
    _, run = federate(worlds, shape, tmp_path, words, preset)
    clips = [record["privacy"]["clip"] for record in lines(run)]
    assert clips[0] == 0.1 and len(set(clips)) == 4


@pytest.mark.parametrize("shape", [(2, 1)])
def test_a_run_ends_at_its_budget(worlds, data, tmp_path, shape):
    """Before the round that would cost more, with exit code 0, the bits of a run of so many rounds,
    and no more rounds to be had."""
    worlds.call(
        shape, "tests.mpi.cases.privacy:budget", folder=tmp_path, words=overrides(data),
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(1, 1)])
def test_a_run_that_goes_on_keeps_noise_and_account(worlds, data, tmp_path, shape):
    """Two rounds and then two more are four at once, the norm included; with a secret key too it
    goes on, and not without it."""
    worlds.call(
        shape, "tests.mpi.cases.privacy:resume", folder=tmp_path,
        words=overrides(data, "privacy.clip=adaptive"),
    )  # fmt: skip


ROWS = ["privacy.unit=sample", "local.batch_size=2", "local.clip=0", "federation.rounds=2",
        "federation.per_round=3", "privacy.clip=6.0", "local.lr=0.02"]  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "stage", "more"),
    [
        ((1, 1), "zero0", []), ((2, 1), "zero0", []),
        ((1, 2), "zero2", ["local.micro_batch=1"]),
        ((1, 1), "zero3", ["model.gradient_checkpointing=true"]),
        pytest.param((1, 2), "zero0", [], marks=pytest.mark.long),
        pytest.param((1, 2), "zero3", [], marks=pytest.mark.long),
        pytest.param(
            (1, 1), "zero1", ["model.gradient_checkpointing=true"], marks=pytest.mark.long
        ),
    ],
)  # fmt: skip
def test_steps_of_rows_equal_the_plain_loop(worlds, once, data, tmp_path, shape, stage, more):
    """Rows drawn by chance, none too, each one's gradient clipped, noise, a fixed denominator; at
    every stage, over ranks and micro-batches, and the same bits on 1 and 2 slots."""
    config = resolve("lora-fedavg", overrides(data, *ROWS)).config
    wanted, sizes, norms = once("descent", lambda: private_descent(config))
    assert min(sizes) == 0 and max(sizes) > 3, sizes
    assert min(norms) < 6 < max(norms), "clipping is not what the test shows"
    words = overrides(data, *ROWS, f"deepspeed=ds_configs/{stage}.json", *more)
    found, run = federate(worlds, shape, tmp_path, words)
    moved = found["values"] - found["initial"]
    reference = wanted.numpy() - found["initial"]
    assert np.linalg.norm(moved - reference) <= 1e-4 * np.linalg.norm(reference)
    if shape[1] == 1 and stage == "zero0":
        now = (found["values"], metrics(run))
        first = once("descent-bits", lambda: now)
        assert np.array_equal(now[0], first[0]) and now[1] == first[1]
    spent = [record["privacy"]["epsilon"] for record in lines(run)]
    summary = json.loads((run / "summary.json").read_text())["privacy"]
    assert 0 < spent[0] < spent[1] == summary["epsilon"] and summary["unit"] == "sample"


@pytest.mark.parametrize("shape", [(1, 1)])
def test_steps_of_rows_go_on(worlds, data, tmp_path, shape):
    """Half of the rounds and then the others are all at once; dropout falls alike in both passes,
    and what is frozen stays."""
    worlds.call(
        shape, "tests.mpi.cases.privacy:resume", folder=tmp_path,
        words=overrides(data, *ROWS, "model.dropout=0.1", "sharing.rule=ffa"),
    )  # fmt: skip
