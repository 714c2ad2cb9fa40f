"""Prompts, heads and adaptive optimization equal a plain loop over clients and samples."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hpcfed.policies.sampling import sample
from hpcfed.settings.resolve import presets, resolve
from tests.mpi import test_factors, test_sharing, variants
from tests.mpi.reference_fedpeptao import Loop, Outcome
from tests.mpi.variants import COMMON
from tests.pairwise import each, others
from tests.same import kept, metrics
from tests.support import MODEL, latest

SGD = ["local.optimizer=sgd", "local.lr=0.5", "local.clip=1.0"]
WIDE = ["local.optimizer=sgd", "local.lr=2", "local.clip=1.0"]
ADAMW = ["local.optimizer=adamw", "local.lr=1e-2"]
PREFIX = ["adapter.kind=prefix", "adapter.virtual_tokens=3", "federation.rounds=4"]
PARTIAL = [*PREFIX, "layers.score=eigenvalue", "layers.keep=0.5", "curriculum.warmup=1"]
WORDS = "{person: who, place: where, number: many, time: when, reason: why}"
GAP = ["task.template='{a} <mask>'", f"task.verbalizer={WORDS}"]

# What differs from p-tuning-v2's plain mean.
VARIANTS: dict[str, list[str]] = {
    "prefix": [*WIDE, *PREFIX],
    "prefix-accumulate": [
        *WIDE, *PREFIX, "local.micro_batch=3", "model.gradient_checkpointing=true",
    ],
    "prompt": [*WIDE, "adapter.kind=prompt", "adapter.virtual_tokens=3", "layers.score=all"],
    "published": [
        *WIDE, *PARTIAL, "server.optimizer=momentum", "server.gradient=difference",
        "server.control=true", "server.lr=0.05", "server.lr_decay=0.99",
    ],
    "control": [*WIDE, *PARTIAL, "server.optimizer=momentum", "server.control=true",
                "server.momentum=0.5"],
    "scaffold": [*SGD, "adapter.kind=lora", "layers.score=eigenvalue", "layers.keep=0.5",
                 "curriculum.warmup=1", "local.control=true", "federation.rounds=4"],
    "prox": [*WIDE, *PREFIX, "local.proximal=0.5"],
    "momd": [*WIDE, *PREFIX, "local.momentum=0.9", "local.lr=0.5", "local.moments=keep"],
    "moms-adamd": [*PREFIX, "local.optimizer=adam", "local.lr=1e-2", "local.moments=keep",
                   "server.optimizer=momentum", "server.momentum=0.5"],
    "fedadam": [*ADAMW, *PREFIX, "server.optimizer=adam", "server.lr=0.02"],
    "scaffold-adamw": [*ADAMW, *PREFIX, "local.control=true"],
    "houlsby": [*SGD, "adapter.kind=bottleneck", "adapter.placement=houlsby",
                "adapter.reduction=8", "layers.score=all"],
    "pfeiffer": [*SGD, "adapter.kind=bottleneck", "adapter.reduction=8", "layers.score=all"],
    "cloze": [*SGD, *PREFIX, *GAP, "model.head=cloze", "model.name={out}/bert-cloze"],
    "cloze-lora": [*SGD, *GAP, "model.head=cloze", "model.name={out}/bert-cloze",
                   "adapter.kind=lora"],
    "words": [*SGD, *PREFIX, *GAP, "model.head=label_words", "model.name={out}/llama-label_words"],
    "words-prompt": [*SGD, *GAP, "model.head=label_words", "model.name={out}/gpt2-label_words",
                     "adapter.kind=prompt", "layers.score=all"],
}  # fmt: skip

FACTORS: dict[str, list[Any]] = {
    "shape": [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)],
    "name": list(VARIANTS),
    "stage": ["zero0", "zero1", "zero2", "zero3", "offload"],
}
# What a method exchanges meets one slot, several, and several ranks of one; four ranks meet in
# test_equivalence, and below.
FEW = each({**FACTORS, "shape": [(1, 1), (2, 1), (1, 2)]})
MANY = others(FACTORS, FEW)


def overrides(out, name, stage="zero0"):
    own = [word.replace("{out}", str(out)) for word in VARIANTS[name]]
    return [
        *COMMON, "adapter.dropout=0", "local.weight_decay=0",
        f"model.name={out}/bert-classifier", *own, f"data.root={out}",
        f"deepspeed=ds_configs/{stage}.json",
    ]  # fmt: skip


def federate(worlds, shape, tmp_path, words, lost=(), preset="p-tuning-v2"):
    """Final values, initial ones, and the run's directory."""
    found, run = variants.federate(worlds, shape, tmp_path, words, preset, lost)
    return found["values"], found["initial"], run


@pytest.fixture
def reference(data, once):
    """reference(name): what the plain loop came to."""

    def get(name, words=None, lost=()):
        def make():
            loop = Loop(resolve("p-tuning-v2", words or overrides(data, name)).config, lost)
            return loop.run()

        return once(f"fedpeptao-{name}{lost or ''}", make)

    return get


def compare(values, run, loop: Outcome, tolerance):
    """A run with the plain loop: the choice of layers, shared values, personal values."""
    if loop.scores:
        selection = json.loads((run / "selection.json").read_text())
        assert selection["shared_layers"] == loop.layers
        assert selection["scores"] == pytest.approx(loop.scores, rel=1e-3)
        assert 1 < len(loop.layers) < len(loop.layout.layers)
    layout = loop.layout
    for block in layout.blocks:
        span = layout.span(block)
        if block in loop.layers or loop.shared_part[span].all():
            check(loop, values, loop.values, span, tolerance, f"shared {block}")
    home = [block for block in layout.layers if block not in loop.layers]
    for k, own in loop.personal.items() if home else ():
        (file,) = latest(run.glob(f"clients/{k:06d}/personal-*.safetensors"))
        personal = loop.initial.float().clone()
        layout.part(home).unpack(load_file(file)["values"], personal)
        for block in home:
            check(loop, personal.numpy(), own, layout.span(block), tolerance, f"client {k}")
    if loop.controls:
        check_controls(loop, run, least=3)


def tolerance(name):
    return 1e-3 if "adam" in name else 1e-5


@pytest.mark.parametrize(("shape", "name", "stage"), FEW)
def test_equals_the_plain_loop(worlds, reference, data, tmp_path, shape, name, stage):
    values, _, run = federate(worlds, shape, tmp_path, overrides(data, name, stage))
    compare(values, run, reference(name), tolerance(name))


@pytest.mark.long
@pytest.mark.parametrize(("shape", "name", "stage"), MANY)
def test_equals_the_plain_loop_in_full(worlds, reference, data, tmp_path, shape, name, stage):
    values, _, run = federate(worlds, shape, tmp_path, overrides(data, name, stage))
    compare(values, run, reference(name), tolerance(name))


@pytest.mark.parametrize("shape", [(2, 1)])
def test_a_real_model(worlds, reference, data, tmp_path, shape):
    """MiniLM, prompts in every layer, kept moments, server momentum."""
    words = [*overrides(data, "moms-adamd", "zero2"), f"model.name={MODEL}"]
    values, _, run = federate(worlds, shape, tmp_path, words)
    compare(values, run, reference("minilm", words), 1e-3)


def check(loop, values, wanted, span, tolerance, what):
    """||D - Dref|| / ||Dref||, D the way from the initial values."""
    start = loop.initial.numpy()[span]
    moved, reference = values[span] - start, wanted.numpy()[span] - start
    assert np.linalg.norm(reference) > 1e-3, f"{what} did not move: the test shows nothing"
    difference = np.linalg.norm(moved - reference) / np.linalg.norm(reference)
    assert difference <= tolerance, f"{what}: {difference:.2e}"


def check_controls(loop, run, least):
    """The clients' control variates on disk, of at least so many clients."""
    blocks = [block for block in loop.layout.blocks if block in (*loop.layers, "head")]
    seen = 0
    for k, wanted in loop.controls.items():
        for file in latest(run.glob(f"clients/{k:06d}/control-*.safetensors")):
            near(loop, load_file(file)["control"], wanted, blocks)
            seen += 1
    assert seen >= least
    checkpoint = max(run.glob("checkpoint/round-*.safetensors"))
    near(loop, load_file(checkpoint)["server.control"], loop.c, blocks)


def near(loop, found, wanted, blocks):
    """Equal where something is shared, and zero elsewhere."""
    part = loop.layout.part(blocks)
    packed, own = part.pack(wanted), part.pack(found.double())
    assert float(packed.norm()) > 0
    assert float((own - packed).norm() / packed.norm()) <= 1e-4
    part.unpack(torch.zeros(len(own)), found)
    assert not found.any()


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (4, 1)])
@pytest.mark.parametrize(
    "name", ["published", pytest.param("control", marks=pytest.mark.long), "scaffold", "momd"]
)
def test_bit_identical_for_any_number_of_slots(worlds, data, once, tmp_path, shape, name):
    """Each compares with the first of the three that ran."""
    values, _, run = federate(worlds, shape, tmp_path, overrides(data, name))
    files = kept(run)
    kind = "moments-" if name == "momd" else "control-"
    assert any(kind in path for path in files)
    now = (values, files, metrics(run))
    first = once(f"fedpeptao-bits-{name}", lambda: now)
    assert np.array_equal(now[0], first[0])
    assert now[1:] == first[1:]


@pytest.mark.parametrize("shape", [(2, 1)])
@pytest.mark.parametrize(
    ("name", "sums", "factor"),
    [
        ("prefix", 1, 1),
        ("published", 3, 1),
        ("control", 2, 1),
        ("scaffold", 2, 2),
        ("houlsby", 1, 1),
        ("pfeiffer", 1, 1),
    ],
)
def test_what_travels(worlds, reference, data, tmp_path, shape, name, sums, factor):
    """The server's control variates cost the clients nothing, SCAFFOLD's both ways. Between the
    slots: values and control sums, a weight and statistics of each of 2 slots as float64; then the
    means as fp32: nothing else is on the wire in a round."""
    loop = reference(name)
    _, _, run = federate(worlds, shape, tmp_path, overrides(data, name))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    shared = loop.layout.part((*loop.layers, "head")).size
    assert lines[-1]["values"]["up"] == 3 * shared * factor
    warm = loop.config.curriculum.warmup
    assert [line["values"]["up"] for line in lines[:warm]] == [3 * loop.layout.size] * warm
    small = 1 + 3 * 7 + 2 * 2 + 2
    assert lines[-1]["bytes"]["wire"] == (sums * shared + small) * 8 * 2 + sums * shared * 4


@pytest.mark.long
@pytest.mark.parametrize("shape", [(1, 1)])
def test_a_rank_holds_no_more_with_more_clients(worlds, tmp_path, shape):
    worlds.call(shape, "tests.mpi.cases.clients:check", out=tmp_path)


@pytest.mark.parametrize("shape", [(1, 1)])
@pytest.mark.parametrize("name", ["published", "control", "scaffold"])
def test_a_client_that_fails_keeps_its_control_variate(
    worlds, reference, data, tmp_path, shape, name
):
    """One sampled client's update is lost in the last round: the others' values, and every
    client's control variate, are those of the plain loop in which it was not sampled."""
    words = overrides(data, name)
    config = resolve("p-tuning-v2", words).config
    clients = config.federation.clients or 0
    *_, before, last = (
        sample(config.seed, number, clients, config.federation.per_round)
        for number in range(config.federation.rounds)
    )
    client = next(k for k in last if k in before)
    lost = ((config.federation.rounds - 1, client),)
    values, _, run = federate(worlds, shape, tmp_path, words, lost)
    loop = reference(name, lost=lost)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [list(line["failed"]) for line in lines] == [[], [], [], [str(client)]]
    assert all(0 < line["train_loss"] < 9 for line in lines)
    for block in (*loop.layers, "head"):
        check(loop, values, loop.values, loop.layout.span(block), 1e-5, f"shared {block}")
    check_controls(loop, run, least=3)
    (file,) = latest(run.glob(f"clients/{client:06d}/control-*.safetensors"))
    assert float(load_file(file)["control"].abs().max()) > 0


# Presets that run elsewhere: the demo; attempt, which needs prompts of others (test_generated);
# those with privacy, which solve for their noise first (test_privacy).
APART = {"demo", "instruct-demo", "attempt", "dp-fibecfed", "dp-fedpeptao", "dp-ffa-lora"}
# Those that are compared with a plain loop from their presets; as shipped they run when there is
# time.
COMPARED = {name for name, _ in {**test_sharing.METHODS, **test_factors.METHODS}.values()}
COMPARED |= {"lora-fedavg", "p-tuning-v2", "fibecfed"}
METHODS = [
    pytest.param(name, marks=pytest.mark.long) if name in COMPARED else name
    for name in sorted(presets().keys() - APART)
]


@pytest.mark.parametrize("shape", [(1, 1)])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_from_its_preset(worlds, data, tmp_path, shape, method):
    """Each composition as shipped, two rounds behind its warm-up: it ends, and it has moved."""
    config = resolve(method).config
    words = [
        *COMMON, f"method={method}", f"data.root={data}",
        f"model.name={data}/bert-{config.model.head}",
        f"federation.rounds={2 + config.curriculum.warmup}",
        *(GAP if config.model.head == "cloze" else []),
    ]  # fmt: skip
    values, initial, run = federate(worlds, shape, tmp_path, words, preset="lora-fedavg")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["method"] == method and summary["failures"] == 0
    moved = [values - initial]
    if method == "local-only":  # nothing is the server's
        assert np.array_equal(values, initial)
        files = latest(run.glob("clients/*/personal-*.safetensors"))
        moved = [load_file(file)["values"].numpy() - initial for file in files]
    assert moved and all(np.isfinite(own).all() and np.abs(own).max() > 1e-3 for own in moved)
    losses = [line["train_loss"] for line in metrics(run)]
    assert len(set(losses)) == len(losses), f"the loss does not move: {losses}"
