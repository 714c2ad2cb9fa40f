"""Prompts, heads and adaptive optimization equal a plain loop over clients and samples."""

import json

import numpy as np
import pytest
from safetensors.torch import load_file

from hpcfed.policies.sampling import sample
from hpcfed.resolve import presets, resolve
from tests import models
from tests.mpi.reference_fedpeptao import Loop
from tests.mpi.variants import COMMON, write_data
from tests.mpi.worlds import run_worlds
from tests.support import many_runs, mpiexec

SGD = ["local.optimizer=sgd", "local.lr=0.5", "local.clip=1.0"]
# With SGD on MiniLM a prefix moves a thousandth of what the classifier does, and hardly more than
# fp32 can show; a small random model with wide weights is not so lopsided.
WIDE = ["local.optimizer=sgd", "local.lr=2", "local.clip=1.0", "model.name={out}/bert-classifier"]
ADAMW = ["local.optimizer=adamw", "local.lr=1e-2"]
PREFIX = ["adapter.kind=prefix", "adapter.virtual_tokens=3", "federation.rounds=4"]
PARTIAL = [*PREFIX, "layers.score=eigenvalue", "layers.keep=0.5", "curriculum.warmup=1"]
WORDS = "{person: who, place: where, number: many, time: when, reason: why}"
GAP = ["task.template='{a} <mask>'", f"task.verbalizer={WORDS}"]

# What differs from p-tuning-v2's plain mean on MiniLM.
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
    "cloze": [*SGD, *PREFIX, *GAP, "model.head=cloze", "model.name={out}/bert-cloze"],
    "cloze-lora": [*SGD, *GAP, "model.head=cloze", "model.name={out}/bert-cloze",
                   "adapter.kind=lora"],
    "words": [*SGD, *PREFIX, *GAP, "model.head=label_words", "model.name={out}/llama-label_words"],
    "words-prompt": [*SGD, *GAP, "model.head=label_words", "model.name={out}/gpt2-label_words",
                     "adapter.kind=prompt", "layers.score=all"],
}  # fmt: skip

# (slots, ranks per client) -> variant and ZeRO stage
WORLDS = {
    (1, 1): [
        "prefix:zero0", "prefix:zero2", "prefix-accumulate:zero3", "prompt:zero0",
        "published:zero0", "control:zero0", "scaffold:zero0", "prox:zero0", "momd:zero0",
        "moms-adamd:zero1", "fedadam:zero0", "cloze:zero0", "words:zero0",
    ],
    (2, 1): ["published:zero0", "control:zero0", "scaffold:zero0", "momd:zero0"],
    (4, 1): ["published:zero0", "control:zero0", "scaffold:zero0"],
    (1, 2): [
        "prefix:zero1", "prefix:zero3", "prefix-accumulate:zero2", "prompt:zero3",
        "published:zero2", "control:zero3", "scaffold:zero1", "scaffold:zero3", "prox:zero2",
        "momd:zero3", "moms-adamd:zero2", "scaffold-adamw:zero1", "cloze:zero3",
        "cloze-lora:zero1", "words:zero2", "words-prompt:zero1",
    ],
    (2, 2): ["control:zero1", "momd:zero2"],
}  # fmt: skip


def overrides(out, case):
    name, stage = case.split(":")
    own = [word.replace("{out}", str(out)) for word in VARIANTS[name]]
    return [*COMMON, "adapter.dropout=0", "local.weight_decay=0", *own, f"data.root={out}",
            f"deepspeed=ds_configs/{stage}.json"]  # fmt: skip


def save_models(out):
    for architecture, head, width in (
        ("bert", "classifier", 0.2), ("bert", "cloze", 0.2), ("llama", "label_words", 0.02),
        ("gpt2", "label_words", 0.02),
    ):  # fmt: skip
        models.save(architecture, out / f"{architecture}-{head}", head, initializer_range=width)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """World -> folder with its runs."""
    return run_worlds(tmp_path_factory, WORLDS, overrides, "p-tuning-v2", save_models)


@pytest.fixture(scope="module")
def references(results):
    """Variant -> the plain loop, run, and what it came to."""
    found = {}
    for name in VARIANTS:
        loop = Loop(resolve("p-tuning-v2", overrides(results[1, 1], f"{name}:zero0")).config)
        found[name] = loop, loop.run()
    return found


CASES = [(world, case) for world, cases in WORLDS.items() for case in cases]


@pytest.mark.parametrize(("world", "case"), CASES, ids=str)
def test_equals_the_plain_loop(results, references, world, case):
    name = case.partition(":")[0]
    loop, wanted = references[name]
    run = results[world] / case.replace(":", "-")
    if loop.config.layers.score != "all":
        selection = json.loads((run / "selection.json").read_text())
        assert selection["shared_layers"] == loop.layers
        assert selection["scores"] == pytest.approx(loop.scores, rel=1e-3)
        assert 1 < len(loop.layers) < len(loop.layout.layers)
    tolerance = 1e-3 if "adam" in name else 1e-5
    values, layout = np.load(run.with_suffix(".npy")), loop.layout
    for block in layout.blocks:
        span = layout.span(block)
        if block in loop.layers or loop.shared_part[span].all():
            check(loop, values, wanted, span, tolerance, f"shared {block}")
    home = [block for block in layout.layers if block not in loop.layers]
    for k, own in loop.personal.items() if home else ():
        (file,) = run.glob(f"clients/{k:06d}/personal-*.safetensors")
        personal = loop.initial.float().clone()
        layout.unpack(load_file(file)["values"], home, personal)
        for block in home:
            check(loop, personal.numpy(), own, layout.span(block), tolerance, f"client {k}")


def check(loop, values, wanted, span, tolerance, what):
    """||D - Dref|| / ||Dref||, D the way from the initial values."""
    start = loop.initial.numpy()[span]
    moved, reference = values[span] - start, wanted.numpy()[span] - start
    assert np.linalg.norm(reference) > 1e-3, f"{what} did not move: the test shows nothing"
    difference = np.linalg.norm(moved - reference) / np.linalg.norm(reference)
    assert difference <= tolerance, f"{what}: {difference:.2e}"


@pytest.mark.parametrize("name", ["published", "control", "scaffold"])
def test_control_variates_are_those_of_the_plain_loop(results, references, name):
    loop, _ = references[name]
    check_controls(loop, results[1, 1] / f"{name}-zero0", least=3)
    assert float(loop.c.abs().max() if name != "control" else 1) > 0


def check_controls(loop, run, least):
    """The clients' control variates on disk, of at least so many clients."""
    blocks = [block for block in loop.layout.blocks if block in (*loop.layers, "head")]
    seen = 0
    for k, wanted in loop.controls.items():
        for file in run.glob(f"clients/{k:06d}/control-*.safetensors"):
            found = load_file(file)["control"].double()
            packed = loop.layout.pack(wanted, blocks)
            assert float((found - packed).norm() / packed.norm()) <= 1e-4
            seen += 1
    assert seen >= least


@pytest.mark.parametrize("name", ["published", "control", "scaffold"])
def test_bit_identical_for_any_number_of_slots(results, name):
    runs = [results[slots, 1] / f"{name}-zero0" for slots in (1, 2, 4)]
    values = [np.load(run.with_suffix(".npy")) for run in runs]
    assert all(np.array_equal(values[0], other) for other in values[1:])
    files = [{p.relative_to(run): p.read_bytes() for p in run.glob("clients/*/*")} for run in runs]
    assert any("control-" in str(path) for path in files[0])
    assert files[0] == files[1] == files[2]


def test_kept_moments_do_not_depend_on_the_number_of_slots(results):
    runs = [results[slots, 1] / "momd-zero0" for slots in (1, 2)]
    values = [np.load(run.with_suffix(".npy")) for run in runs]
    assert np.array_equal(*values)
    assert any(runs[0].glob("clients/*/moments-*"))


def test_what_travels(results, references):
    """The server's control variates cost the clients nothing, SCAFFOLD's both ways."""
    for name, factor in (("published", 1), ("control", 1), ("scaffold", 2), ("prefix", 1)):
        loop, _ = references[name]
        run = results[1, 1] / f"{name}-zero0"
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        shared = loop.layout.count((*loop.layers, "head"))
        last = lines[-1]
        assert last["values"]["up"] == 3 * shared * factor
        warm = loop.config.curriculum.warmup
        assert [line["values"]["up"] for line in lines[:warm]] == [3 * loop.layout.size] * warm


@pytest.mark.parametrize(("name", "vectors"), [("published", 3), ("control", 2), ("scaffold", 2)])
def test_one_exchange_carries_all_sums(results, references, name, vectors):
    """Values, control sums, a weight and statistics of each of 2 slots as float64; then the means
    as fp32: nothing else is on the wire in a round."""
    loop, _ = references[name]
    run = results[2, 1] / f"{name}-zero0"
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    values = vectors * loop.layout.count((*loop.layers, "head"))
    small = 1 + 3 * 6 + 2 * 2 + 2
    assert last["bytes"]["wire"] == (values + small) * 8 * 2 + values * 4


def test_a_rank_holds_no_more_with_more_clients(tmp_path):
    assert "clients: ok" in mpiexec(1, "clients.py", str(tmp_path))


def test_a_client_that_fails_keeps_its_control_variate(tmp_path):
    """One sampled client's update is lost in the last round: the others' values, and every
    client's control variate, are those of the plain loop in which it was not sampled."""
    write_data(tmp_path)
    models.save("bert", tmp_path / "bert-classifier", initializer_range=0.2)
    names = ("published", "control", "scaffold")
    runs = {name: overrides(tmp_path, f"{name}:zero0") for name in names}
    config = resolve("p-tuning-v2", runs["control"]).config
    *_, before, last = (
        sample(config.seed, number, config.federation.clients, config.federation.per_round)
        for number in range(config.federation.rounds)
    )
    client = next(k for k in last if k in before)
    lost = ((config.federation.rounds - 1, client),)
    many_runs(tmp_path, 1, 1, runs, preset="p-tuning-v2", lost=lost)
    for name in names:
        loop = Loop(resolve("p-tuning-v2", runs[name]).config, lost)
        wanted, run = loop.run(), tmp_path / name
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [list(line["failed"]) for line in lines] == [[], [], [], [str(client)]]
        assert all(0 < line["train_loss"] < 5 for line in lines)
        values = np.load(tmp_path / f"{name}.npy")
        for block in (*loop.layers, "head"):
            check(loop, values, wanted, loop.layout.span(block), 1e-5, f"{name}: shared {block}")
        check_controls(loop, run, least=3)
        (file,) = run.glob(f"clients/{client:06d}/control-*.safetensors")
        assert float(load_file(file)["control"].abs().max()) > 0


def test_every_method_runs_from_its_preset(tmp_path):
    """Each composition as shipped, two rounds behind its warm-up: it ends, and it has moved."""
    write_data(tmp_path)
    for head in ("classifier", "cloze"):
        models.save("bert", tmp_path / f"bert-{head}", head, initializer_range=0.2)
    methods = [name for name in presets() if name != "demo"]
    runs = {}
    for name in methods:
        config = resolve(name).config
        runs[name] = [
            *COMMON, f"method={name}", f"data.root={tmp_path}",
            f"model.name={tmp_path}/bert-{config.model.head}",
            f"federation.rounds={2 + config.curriculum.warmup}",
            *(GAP if config.model.head == "cloze" else []),
        ]  # fmt: skip
    many_runs(tmp_path, 1, 1, runs)
    for name in methods:
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert summary["method"] == name and summary["failures"] == 0
        values, initial = (np.load(tmp_path / f"{name}{end}.npy") for end in ("", "-initial"))
        assert np.isfinite(values).all() and np.abs(values - initial).max() > 1e-3, name
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line)["train_loss"] for line in lines]
        assert len(set(losses)) == len(losses), f"{name}: the loss does not move: {losses}"
