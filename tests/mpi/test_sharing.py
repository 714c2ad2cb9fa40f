"""What travels, what stays, what is frozen, and who has which rank equal a plain loop."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from hpcfed.policies.sampling import sample
from hpcfed.rng import generator
from hpcfed.settings.resolve import resolve
from tests.mpi import variants
from tests.mpi.reference_sharing import Loop
from tests.mpi.variants import COMMON
from tests.pairwise import each, others
from tests.same import kept, metrics
from tests.support import latest

# Method -> its preset, and what the comparison sets in it. Clients have 1, 1, 2 and 5 batches; with
# this decay some clients give up a rank in a round, and others do not.
METHODS: dict[str, tuple[str, list[str]]] = {
    "ffa": ("ffa-lora", []),
    "fedsa": ("fedsa-lora", ["local.epochs=3"]),  # A moves little
    "rolora": ("rolora", []),
    "fedalt": ("fedalt", ["curriculum.warmup=1", "layers.score=last", "layers.keep=0.5"]),
    "nothing": ("local-only", []),
    "hetlora": ("hetlora", ["updates.rank_decay=0.1", "federation.rounds=4"]),
}

FACTORS: dict[str, list[Any]] = {
    "shape": [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)],
    "method": list(METHODS),
    "stage": ["zero0", "zero1", "zero2", "zero3", "offload"],
}
# As in test_fedpeptao: one slot, several, and several ranks of one.
FEW = each({**FACTORS, "shape": [(1, 1), (2, 1), (1, 2)]})
MANY = others(FACTORS, FEW)


def overrides(data, method, stage="zero0"):
    return [
        *COMMON, "local.optimizer=sgd", "local.lr=0.2", "local.clip=1.0", "local.batch_size=4",
        *METHODS[method][1], f"model.name={data}/bert-classifier",
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
            config = resolve(METHODS[method][0], overrides(data, method)).config
            return Loop(method, config, lost).run()

        return once(f"sharing-{method}{lost or ''}", make)

    return get


def compare(values, run, loop):
    """A run with the plain loop: the server's values, the clients' own, their ranks."""
    moved = (loop.values != loop.initial).numpy()
    assert np.array_equal(values[~moved], loop.initial.numpy()[~moved]), "has moved, and must not"
    for block in loop.layout.blocks:
        span = loop.layout.span(block)
        if moved[span].any():
            check(loop, values, loop.values, span, block)
    files = {int(p.parent.name): p for p in latest(run.glob("clients/*/personal-*"))}
    assert files.keys() == loop.personal.keys()
    for k, wanted in loop.personal.items():
        own = loop.initial.float().clone()
        own[loop.home] = load_file(files[k])["values"]
        at_home = torch.where(loop.home, wanted, loop.initial)
        for block in loop.layout.blocks:
            span = loop.layout.span(block)
            if loop.home[span].any():
                check(loop, own.numpy(), at_home, span, f"{block} of client {k}")
    if loop.config.updates.transforms:
        assert ranks(run) == loop.ranks[-1]


def check(loop, values, wanted, span, what):
    """||D - Dref|| / ||Dref||, D the way from the initial values."""
    start = loop.initial.numpy()[span]
    moved, reference = values[span] - start, wanted.numpy()[span] - start
    assert np.linalg.norm(reference) > 1e-3, f"{what} did not move: the test shows nothing"
    difference = np.linalg.norm(moved - reference) / np.linalg.norm(reference)
    assert difference <= 1e-5, f"{what}: {difference:.2e}"


def ranks(run):
    """What HetLoRA remembers: client -> rank."""
    files = latest(run.glob("clients/*/updates-*.safetensors"))
    return {int(p.parent.name): int(load_file(p)["rank"]) for p in files}


def check_traffic(run, method, shape, loop):
    """Values that clients send and get, and bytes between the slots, by hand: of three layers' two
    matrices of 32 x 32 at rank 8, and a head."""
    slots, ranks_per_client = shape
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    labels = len(json.loads((run / "run.json").read_text())["labels"])
    a = b = 3 * 2 * 8 * 32
    head = 32 * labels + labels
    seen: set[int] = set()
    for number, line in enumerate(lines):
        sampled = line["clients"]
        shared = {
            "ffa": b + head,
            "fedsa": a + head,
            "rolora": (b if number % 2 == 0 else a) + head,
            "fedalt": (a + b) // 3 * 2 + head if number else a + b + head,
            "nothing": 0,
            "hetlora": a + b + head,
        }[method]
        up = down = 3 * shared
        if method == "rolora":  # what other rounds have trained
            down += 3 * (a if number % 2 == 0 else b)
        if method == "fedalt" and number:  # its own layer as the warm-up has left it, once
            down += len(set(sampled) - seen) * (a + b) // 3
            seen |= set(sampled)
        if method == "hetlora":
            up = down = sum(loop.ranks[number][k] * 3 * 2 * (32 + 32) + head for k in sampled)
        assert (line["values"]["up"], line["values"]["down"]) == (up, down), number
        # Each slot's sums and, on each of its ranks, statistics; back come the means. With ranks a
        # weight beside each value, else one for all.
        weights = shared if method == "hetlora" else ranks_per_client
        small = ranks_per_client * (3 * 7 + slots * 2 + 2)
        wire = (shared + weights + small) * 8 * slots + shared * 4 if slots > 1 else 0
        assert line["bytes"]["wire"] == wire, number


@pytest.mark.parametrize(("shape", "method", "stage"), FEW)
def test_equals_the_plain_loop(worlds, reference, data, tmp_path, shape, method, stage):
    """And what travels is what the method says."""
    loop = reference(method)
    values, run = federate(worlds, shape, tmp_path, data, method, stage=stage)
    compare(values, run, loop)
    check_traffic(run, method, shape, loop)


@pytest.mark.long
@pytest.mark.parametrize(("shape", "method", "stage"), MANY)
def test_equals_the_plain_loop_in_full(worlds, reference, data, tmp_path, shape, method, stage):
    loop = reference(method)
    values, run = federate(worlds, shape, tmp_path, data, method, stage=stage)
    compare(values, run, loop)
    check_traffic(run, method, shape, loop)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1)])
@pytest.mark.parametrize("method", ["hetlora", "fedalt"])
def test_bit_identical_for_any_number_of_slots(worlds, data, once, tmp_path, shape, method):
    """Each compares with the first of the two that ran."""
    values, run = federate(worlds, shape, tmp_path, data, method)
    files = kept(run)
    kind = "updates-" if method == "hetlora" else "personal-"
    assert any(kind in path for path in files)
    now = (values, files, metrics(run))
    first = once(f"sharing-bits-{method}", lambda: now)
    assert np.array_equal(now[0], first[0])
    assert now[1:] == first[1:]


@pytest.mark.parametrize("shape", [(1, 2)])
def test_ffa_saves_a_as_the_seed_drew_it(worlds, data, tmp_path, shape):
    """Bit for bit, though ZeRO-3 has sharded it; and the adapter loads with PEFT."""
    _, run = federate(worlds, shape, tmp_path, data, "ffa", stage="zero3")
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    factors = {name: value for name, value in tensors.items() if ".lora_A." in name}
    assert len(factors) == 6
    for name, value in factors.items():
        drawn = generator(352, "init", name).uniform(-(32**-0.5), 32**-0.5, (8, 32))
        assert torch.equal(value, torch.from_numpy(drawn.astype(np.float32))), name
    assert all(value.any() for name, value in tensors.items() if ".lora_B." in name)
    labels = json.loads((run / "adapter" / "labels.json").read_text())
    base = AutoModelForSequenceClassification.from_pretrained(
        data / "bert-classifier", num_labels=len(labels)
    )
    loaded = dict(PeftModel.from_pretrained(base, run / "adapter").named_parameters())
    for name, value in tensors.items():
        if ".lora_" in name:
            assert torch.equal(loaded[name.replace(".weight", ".default.weight")], value), name


@pytest.mark.parametrize("shape", [(2, 1)])
def test_a_rank_may_lag_behind(worlds, data, tmp_path, shape):
    """The first rank may have removed what a round replaces before the others have done theirs."""
    worlds.call(
        shape, "tests.mpi.cases.slow_rank:check", folder=tmp_path,
        words=overrides(data, "hetlora"), preset="hetlora",
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(1, 1)])
def test_a_client_that_fails_keeps_its_rank(worlds, reference, data, tmp_path, shape):
    """Its update is lost in the round in which it would have given one up."""
    round_number, client = 3, 3
    well = reference("hetlora")
    assert well.ranks[4][client] < well.ranks[3][client] == well.ranks[0][client]
    lost = ((round_number, client),)
    values, run = federate(worlds, shape, tmp_path, data, "hetlora", lost=lost)
    loop = reference("hetlora", lost)
    assert loop.ranks[4] == {**well.ranks[4], client: well.ranks[3][client]}
    compare(values, run, loop)
    last = (run / "metrics.jsonl").read_text().splitlines()[-1]
    assert list(json.loads(last)["failed"]) == [str(client)]


@pytest.mark.parametrize("shape", [(1, 1)])
def test_a_client_that_fails_keeps_its_own_values(worlds, reference, data, tmp_path, shape):
    """Its update is lost in the last round, when it has values of its own from an earlier one."""
    federation = resolve(METHODS["fedsa"][0], overrides(data, "fedsa")).config.federation
    clients = federation.clients
    assert clients is not None
    *earlier, last = (
        sample(352, number, clients, federation.per_round) for number in range(federation.rounds)
    )
    client = next(k for k in last if any(k in sampled for sampled in earlier))
    lost = ((federation.rounds - 1, client),)
    values, run = federate(worlds, shape, tmp_path, data, "fedsa", lost=lost)
    loop = reference("fedsa", lost)
    assert not torch.equal(loop.personal[client], reference("fedsa").personal[client])
    compare(values, run, loop)
