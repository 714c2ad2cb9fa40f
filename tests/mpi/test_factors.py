"""What the server makes of each client's LoRA factors equals a plain loop with dense weights; what
travels, what is exported, and what a resumed run goes on from."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hpcfed import model
from hpcfed.settings.resolve import resolve
from tests.mpi import variants
from tests.mpi.reference_factors import Loop, factors
from tests.mpi.variants import COMMON
from tests.pairwise import pairwise, product
from tests.same import metrics

# Rule -> its preset. A residual of rank 32 holds all of 32 x 32.
METHODS: dict[str, tuple[str, list[str]]] = {
    "fedex": ("fedex-lora", ["adapter.residual=32"]),
    "flora": ("flora", ["adapter.residual=32"]),
    "flexlora": ("flexlora", []),
    "fair": ("lora-fair", []),
    "delta": ("delta-lora", ["adapter.residual=32", "adapter.delta=0.5"]),
}
MOVES = ("fedex", "flora", "delta")

FACTORS: dict[str, list[Any]] = {
    "shape": [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)],
    "method": list(METHODS),
    "stage": ["zero0", "zero1", "zero2", "zero3", "offload"],
}
FEW = [
    ((1, 1), "fedex", "zero3"), ((1, 1), "flora", "zero0"), ((1, 1), "delta", "zero1"),
    ((2, 1), "fair", "zero2"), ((2, 1), "flexlora", "zero1"), ((1, 2), "delta", "zero3"),
]  # fmt: skip
MANY = [case for case in pairwise(FACTORS) if case not in FEW]


def overrides(data, method, stage="zero0"):
    return [
        *COMMON, "local.optimizer=sgd", "local.lr=0.6", "local.clip=1.0", "local.batch_size=4",
        "local.epochs=2", *METHODS[method][1], f"model.name={data}/bert-classifier",
        f"data.root={data}", f"deepspeed=ds_configs/{stage}.json",
    ]  # fmt: skip


def federate(worlds, shape, folder, data, method, *extra, stage="zero0", lost=()):
    """The server's values at last, and the run's directory."""
    words = [*overrides(data, method, stage), *extra]
    found, run = variants.federate(worlds, shape, folder, words, METHODS[method][0], lost)
    return found["values"], run


@pytest.fixture
def reference(data, once):
    """reference(method): what the plain loop came to."""

    def get(method, lost=()):
        def make():
            return Loop(resolve(METHODS[method][0], overrides(data, method)).config, lost).run()

        return once(f"factors-{method}{lost or ''}", make)

    return get


def compare(values, data, loop):
    """All that is added to each weight, and the head, as a share of how far it has moved."""
    # Where LoRA starts anew, or its directions turn, rounding grows from round to round.
    close = 2e-4 if loop.config.aggregation.rule in ("flora", "flexlora") else 5e-5
    config = loop.config
    layout = model.outline(config, labels_of(data), 0).layout
    assert (len(values) > loop.layout.size) == (config.aggregation.rule in MOVES)
    values = torch.from_numpy(values).double()
    trained = torch.zeros(loop.layout.size, dtype=torch.float64)
    own = {entry.name: entry for entry in layout.entries}
    for entry in loop.layout.entries:
        trained[entry.values] = values[own[entry.name].values]
    scale = config.adapter.alpha / config.adapter.rank
    for name, (a, b) in factors(loop.layout, trained).items():
        change = scale * (1 + config.adapter.delta) * b @ a
        if f"{name}.residual_U.weight" in own:
            u, v = (own[f"{name}.residual_{role}.weight"] for role in "UV")
            residual = values[u.values].view(u.shape) @ values[v.values].view(v.shape)
            change = change + scale * residual
            if not config.adapter.delta:
                moved = loop.moved[name]
                assert float(moved.norm()) > 1e-4, "has not moved: the test shows nothing"
                assert float((scale * residual - moved).norm() / moved.norm()) < 0.02, name
        wanted = loop.change(loop.values, name)
        assert float(wanted.norm()) > 0.05
        difference = float((change - wanted).norm() / wanted.norm())
        assert difference <= close, f"{name}: {difference:.2e}"
    span = loop.layout.span("head")
    moved, wanted = (v[span] - loop.initial[span] for v in (trained, loop.values))
    assert float((moved - wanted).norm() / wanted.norm()) <= close


def labels_of(data):
    lines = (data / "few" / "train.jsonl").read_text().splitlines()
    return tuple(sorted({json.loads(line)["label"] for line in lines}))


def check_traffic(run, method, shape, loop):
    """Values that clients send and get, and bytes between the slots, by hand: of three layers' two
    matrices of 32 x 32 at rank 8, a residual of rank 32, and a head."""
    slots, ranks_per_client = shape
    labels = len(json.loads((run / "run.json").read_text())["labels"])
    both, head, residual = 6 * 8 * 64, 33 * labels, 6 * 32 * 64
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        sizes = [6 * loop.ranks[k] * 64 + head for k in line["clients"]]
        if method == "flexlora":
            assert len(set(sizes)) > 1
        down = {"fedex": both + head + residual, "delta": both + head + residual,
                "flora": head + residual}.get(method)  # fmt: skip
        assert line["values"]["up"] == sum(sizes)
        assert line["values"]["down"] == (sum(sizes) if down is None else 3 * down)
        assert ("residual_lost" in line) == (method in MOVES)
        assert line.get("residual_lost", 0.0) < 1e-6
        if slots == 1:
            assert line["bytes"]["wire"] == 0
            continue
        # The sums, as ever; the factors of clients that are not in the first slot, as fp32; back,
        # what the first rank has made of them, and what was lost.
        weights = both + head if method == "flexlora" else ranks_per_client
        small = ranks_per_client * (3 * 7 + slots * 2 + 2)
        wire = (both + head + weights + small) * 8 * slots + (both + head) * 4
        wire += (both + (residual if method in MOVES else 0) + 1) * 4
        clients, rest = divmod(line["bytes"]["wire"] - wire, both * 4)
        assert rest == 0 and slots - 1 <= clients <= 2


@pytest.mark.parametrize(("shape", "method", "stage"), FEW)
def test_equals_the_plain_loop(worlds, reference, data, tmp_path, shape, method, stage):
    """And what travels is what the method says."""
    loop = reference(method)
    values, run = federate(worlds, shape, tmp_path, data, method, stage=stage)
    compare(values, data, loop)
    check_traffic(run, method, shape, loop)


@pytest.mark.long
@pytest.mark.parametrize(("shape", "method", "stage"), MANY)
def test_equals_the_plain_loop_in_full(worlds, reference, data, tmp_path, shape, method, stage):
    loop = reference(method)
    values, run = federate(worlds, shape, tmp_path, data, method, stage=stage)
    compare(values, data, loop)
    check_traffic(run, method, shape, loop)


def test_each_value_is_in_a_short_case():
    assert {method for _, method, _ in FEW} == set(METHODS)
    assert {stage for _, _, stage in FEW} == {*FACTORS["stage"]} - {"offload"}
    assert len(product(FACTORS)) > len(FEW) + len(MANY)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1)])
@pytest.mark.parametrize("method", ["fedex", "flexlora"])
def test_bit_identical_for_any_number_of_slots(worlds, data, once, tmp_path, shape, method):
    """Each compares with the first of the two that ran."""
    values, run = federate(worlds, shape, tmp_path, data, method)
    first = once(f"factors-bits-{method}", lambda: (values, metrics(run)))
    assert np.array_equal(values, first[0]) and metrics(run) == first[1]


@pytest.mark.parametrize("shape", [(1, 1)])
def test_a_client_that_fails_is_in_no_product(worlds, reference, data, tmp_path, shape):
    lost = ((1, 3),)
    values, run = federate(worlds, shape, tmp_path, data, "fedex", lost=lost)
    failed = [list(line["failed"]) for line in metrics(run)]
    assert failed == [[], ["3"], []]
    compare(values, data, reference("fedex", lost))


@pytest.mark.parametrize("shape", [(1, 2)])
@pytest.mark.parametrize("method", [pytest.param("fedex", marks=pytest.mark.long), "delta"])
def test_the_folder_predicts_the_same(worlds, data, tmp_path, shape, method):
    """PEFT loads residual and LoRA as one of greater rank; ZeRO-3 has sharded it."""
    _, run = federate(worlds, shape, tmp_path, data, method, "adapter.residual=4", stage="zero3")
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8 + 4, 16 / 8 * (8 + 4))
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    for name, value in tensors.items():
        if ".lora_" in name:
            own = value[8:] if "lora_A" in name else value[:, 8:]
            assert 12 in value.shape and own.any(), name
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(0.01 < line["residual_lost"] < 0.99 for line in lines)
    labels = json.loads((run / "adapter" / "labels.json").read_text())
    folder = data / "bert-classifier"
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(labels))
    loaded = PeftModel.from_pretrained(base, run / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = map(json.loads, (data / "few" / "test.jsonl").read_text().splitlines())
    told = []
    for row in rows:
        inputs = tokenizer(row["text"], return_tensors="pt", truncation=True, max_length=32)
        told.append(int(loaded(**inputs).logits.argmax()))
    predictions = json.loads((run / "predictions.json").read_text())
    assert [told[row] for row in predictions["row"]] == predictions["global"]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["test"]["global"] == summary["test"]["personal"]


RESUMED = [
    *COMMON, "local.optimizer=sgd", "local.lr=0.5", "federation.rounds=4", "data.validation=0.2",
    "evaluation.every=2",
]  # fmt: skip


@pytest.mark.parametrize("shape", [(1, 1)])
@pytest.mark.parametrize(
    "method",
    ["fedex", "flexlora", *(pytest.param(m, marks=pytest.mark.long) for m in ("flora", "delta"))],
)
def test_goes_on_with_the_same_bits(worlds, data, tmp_path, shape, method):
    preset, extra = METHODS[method]
    words = [*RESUMED, *extra, f"data.root={data}", f"model.name={data}/bert-classifier"]
    worlds.call(
        shape, "tests.mpi.cases.resume:check", preset=preset, words=words, folder=tmp_path,
        times=1, only=["exchange", "commit", "sweep"],
    )  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("shape", [(2, 1)])
@pytest.mark.parametrize("method", METHODS)
def test_learns_the_built_in_questions(worlds, tmp_path, shape, method):
    words = [
        "task.max_length=48", "federation.clients=12", "federation.per_round=4",
        "federation.rounds=6", "cluster.threads=1", "local.lr=2e-3",
    ]  # fmt: skip
    worlds.call(
        shape, "tests.mpi.cases.runs:federate", folder=tmp_path, runs={"run": words},
        preset=METHODS[method][0], seconds=600.0,
    )  # fmt: skip
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["accuracy"]["global"] > 0.7 > 3 * summary["majority"]
