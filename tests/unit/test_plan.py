"""The plan's figures against a model that is really there."""

import dataclasses

import numpy as np
import pytest
import torch
import yaml
from transformers import DynamicCache

from hpcfed import model, quantized
from hpcfed.app.cli import main
from hpcfed.app.plan import activation_bytes, cache_bytes, memory, plan
from hpcfed.data.batches import padding
from hpcfed.errors import UserError
from hpcfed.settings import deepspeed_config
from hpcfed.settings.resolve import resolve
from tests import models
from tests.support import MODEL

ROWS, LENGTH = 4, 32
LABELS = ("a", "b", "c")


def config(*extra):
    return resolve("lora-fedavg", [f"model.name={MODEL}", "model.dropout=0", *extra]).config


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["adapter.kind=prefix", "adapter.virtual_tokens=5"],
        ["model.gradient_checkpointing=true"],
    ],
)
def test_activations_are_what_autograd_keeps(extra):
    own = config(*extra)
    prepared = model.prepare(own, LABELS, 0, deepspeed_config.load(own))
    network = prepared.adapted.network.train()
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept, largest = {}, 0

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.ones((ROWS, LENGTH), dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = network(input_ids=ids, attention_mask=torch.ones_like(ids))
    del result
    largest = max(kept.values())
    planned, traced = activation_bytes(model.outline(own, LABELS, 0), ROWS, LENGTH)
    assert traced
    assert planned == pytest.approx(sum(kept.values()) + 2 * largest, rel=0.05)


def test_the_outline_is_the_model():
    own = config()
    prepared = model.prepare(own, LABELS, 0, deepspeed_config.load(own))
    outline = model.outline(own, LABELS, 0)
    assert outline.layout == prepared.adapted.layout
    values = sum(p.numel() for p in outline.network.parameters())
    assert values - outline.layout.size == prepared.backbone_values
    assert all(p.is_meta for p in outline.network.parameters()), "nothing is loaded"


@pytest.mark.parametrize(
    ("architecture", "extra"),
    [
        ("llama", []),
        ("gpt2", ["model.dtype=bf16"]),
        ("qwen3", ["adapter.kind=prefix", "adapter.virtual_tokens=5"]),
    ],
)
def test_keys_and_values_of_written_answers_are_what_is_kept(tmp_path, architecture, extra):
    models.save(architecture, tmp_path / "model", "completion")
    own = config(
        f"model.name={tmp_path}/model", "model.head=completion", "task.max_length=20",
        "evaluation.batch_size=3", *extra,
    )  # fmt: skip
    assert cache_bytes(own, model.outline(own, (), 0)) == 0
    own = dataclasses.replace(
        own, evaluation=dataclasses.replace(own.evaluation, max_new_tokens=12)
    )
    network = model.prepare(own, (), 0, {}).adapted.network.eval()
    ids, past = torch.ones((3, 32), dtype=torch.int64), DynamicCache()
    with torch.no_grad():
        network(input_ids=ids, attention_mask=torch.ones_like(ids), past=past)
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in past.layers)
    assert cache_bytes(own, model.outline(own, (), 0)) == kept > 0


def test_padding_is_counted_by_micro_batch():
    """Two clients; rows of 1 to 8 tokens, four a batch, of which each of two ranks has two."""
    lengths = np.array([1, 8, 2, 7, 3, 6, 4, 5, 5, 5, 5, 5])
    grouped, drawn = padding([np.arange(8), np.arange(8, 12)], lengths, 4, 2, None, 0)
    assert grouped == pytest.approx(4 / 60)  # of 2 + 2, 4 + 4, ... and 20, as 2 x (2 + 4 + 6 + 8)
    assert drawn > 1.5 * grouped


def test_memory_by_stage():
    own = config("cluster.ranks_per_client=4", "deepspeed=ds_configs/zero3.json")
    outline = model.outline(own, LABELS, 0)
    settings = deepspeed_config.load(own)
    stages = [memory(own, outline, stage, settings, 100.0) for stage in range(4)]
    whole = stages[0].backbone
    assert [s.backbone for s in stages] == [whole, whole, whole, whole / 4]
    assert stages[3].gathered > 0 and not any(s.gathered for s in stages[:3])
    assert stages[1].optimizer == stages[0].optimizer / 4
    half = dataclasses.replace(own, model=dataclasses.replace(own.model, dtype="bf16"))
    halved = memory(half, outline, 1, settings, 100.0)
    assert halved.backbone == whole / 2
    packed = dataclasses.replace(own, model=dataclasses.replace(own.model, quantize="nf4"))
    matrices = 6 * (4 * 384 * 384 + 2 * 384 * 1536)  # of MiniLM's blocks
    saved = matrices * (4 - quantized.BITS / 8)
    assert memory(packed, outline, 0, settings, 100.0).backbone == pytest.approx(whole - saved)


def test_the_plan_says_what_to_use_instead():
    words = [
        f"model.name={MODEL}", "federation.clients=6", "federation.per_round=3",
        "cluster.ranks_per_client=2", "layers.score=sensitivity",
    ]  # fmt: skip
    roomy = "\n".join(plan(resolve("lora-fedavg", words), 1, 4, 80.0))
    assert "1 node x 4 = 4 ranks = 2 slots x 2" in roomy and "does not fit" not in roomy
    assert "3 of 6 layers and the head" in roomy
    assert "round 1: slots are busy" in roomy and "slot 1: " in roomy
    lines = list(plan(resolve("lora-fedavg", words), 1, 4, 1e-3))
    assert any("nothing fits" in line for line in lines)
    with pytest.raises(UserError, match="3 MPI ranks"):
        list(plan(resolve("lora-fedavg", words), 1, 3, 80.0))
    with pytest.raises(UserError, match="a node has 3"):
        list(plan(resolve("lora-fedavg", words), 2, 3, 80.0))
    with pytest.raises(UserError, match="--memory is nan"):
        list(plan(resolve("lora-fedavg", words), 1, 4, float("nan")))


def test_the_plan_of_a_sweep(tmp_path, capsys):
    """Each run's, on the sweep's nodes and tasks unless told otherwise."""
    file = tmp_path / "sweep.yaml"
    federation = {"clients": 6, "per_round": 3}
    file.write_text(
        yaml.safe_dump(
            {"source": "lora-fedavg", "folder": str(tmp_path / "runs"), "executor": "local",
             "overrides": {"model.name": MODEL, "federation": federation},
             "grid": {"local.batch_size": [4, 8]}, "cluster": {"nodes": 2, "tasks_per_node": 3}}
        )
    )  # fmt: skip
    assert main(["plan", str(file), "task.max_length=24"]) == 0
    one, two = capsys.readouterr().out.split("run batch_size=")[1:]
    assert one.startswith("4\n") and two.startswith("8\n")
    assert all("2 nodes x 3 = 6 ranks = 6 slots x 1" in own for own in (one, two))
    assert "4 texts of 24 tokens" in one and "8 texts of 24 tokens" in two
    assert main(["plan", str(file), "--nodes", "1", "--gpus", "1"]) == 0
    assert capsys.readouterr().out.count("1 node x 1 = 1 ranks = 1 slot x 1") == 2
    assert main(["plan", str(file), "task.name=nowhere", f"data.root={tmp_path}"]) == 2
    assert f"hpcfed: {file}, run batch_size=4: " in capsys.readouterr().err


def test_the_plan_gives_no_advice_that_a_run_refuses():
    words = [f"model.name={MODEL}", "federation.clients=6", "federation.per_round=3"]
    half = [*words, "model.dtype=bf16", "deepspeed=ds_configs/zero3.json"]
    text = "\n".join(plan(resolve("lora-fedavg", half), 1, 2, 80.0))
    assert text.count("  fits") == 3 and "not with bf16" in text
    off = [*words, "deepspeed=ds_configs/offload.json"]
    text = "\n".join(plan(resolve("lora-fedavg", off), 1, 2, 1e-3))
    assert "keeps on the host" in text and "nothing fits" not in text


@pytest.mark.parametrize(
    ("extra", "vectors", "width"),
    [
        ([], 1, 8),
        (["collective.wire=float32"], 1, 4),
        (["server.optimizer=momentum", "server.control=true"], 2, 8),
    ],
)
def test_the_planned_bytes_are_those_of_the_exchange(extra, vectors, width):
    """As metrics.jsonl counts them (tests/mpi/test_federation.py), statistics left out."""
    words = [f"model.name={MODEL}", "federation.clients=6", "federation.per_round=3", *extra]
    (line,) = (
        own for own in plan(resolve("lora-fedavg", words), 1, 4, 80.0) if "between the" in own
    )
    labels = 5  # of the built-in questions
    values = 6 * 2 * 2 * 8 * 384 + (384 + 1) * labels
    assert f"{values * vectors * (width * 4 + 4) / 1e6:.2f} MB" in line


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Arguments for a model whose adapters have a larger A than B: query (32 to 32) and value (32
    to 16) in each of three layers, at rank 256; and a head of 5 x 32."""
    folder = models.save("llama", tmp_path_factory.mktemp("llama"))
    return [
        f"model.name={folder}", "adapter.targets=[q_proj,v_proj]", "adapter.rank=256",
        "federation.clients=6", "federation.per_round=3",
    ]  # fmt: skip


A, B, WEIGHT = 3 * 2 * 256 * 32, 3 * 256 * (32 + 16), 5 * 32


@pytest.mark.parametrize(
    ("extra", "values", "how"),
    [
        (["sharing.rule=ffa"], [B + WEIGHT], "of them what sharing.rule=ffa lets travel"),
        (["sharing.rule=fedsa"], [A + WEIGHT], "of them what sharing.rule=fedsa lets travel"),
        (["sharing.rule=rolora"], [B + WEIGHT, A + WEIGHT], " in turns (all layers are shared"),
        (["sharing.rule=rolora", "curriculum.warmup=1"], [A + WEIGHT, B + WEIGHT], " in turns "),
        (["sharing.rule=nothing"], [0], "of them what sharing.rule=nothing lets travel"),
        (
            ["sharing.rule=fedalt", "layers.score=last", "layers.keep=0.67"],
            [(A + B) * 2 // 3 + WEIGHT],
            "of them what sharing.rule=fedalt lets travel",
        ),
    ],
)
def test_what_the_plan_says_of_sharing_rules(uneven, extra, values, how):
    """What each client sends, all of them, and two slots' sums as float64 with the mean as fp32."""
    lines = list(plan(resolve("lora-fedavg", [*uneven, *extra]), 1, 2, 80.0))
    sent, every, wire = (
        " and ".join(f"{value * factor / 1e6:.2f}" for value in values)
        for factor in (4, 3 * 4, 2 * 8 + 4)
    )
    (line,) = (own for own in lines if own.startswith("a round: "))
    assert line.startswith(f"a round: each client sends {sent} MB") and how in line
    assert line.endswith(f", all 3 of them {every} MB")
    assert any(own.startswith(f"between the 2 slots: {wire} MB through MPI") for own in lines)
    warm = f"the first 1 rounds: {(A + B + WEIGHT) * 4 / 1e6:.2f} MB a client"
    assert (warm in lines) == ("curriculum.warmup=1" in extra)


@pytest.mark.parametrize(("preset", "each"), [("adapter", 1), ("adapter-houlsby", 2)])
def test_the_plan_of_bottlenecks(uneven, preset, each):
    """Of three blocks of width 32, down to 4 and up again."""
    words = [word for word in uneven if not word.startswith("adapter.")]
    lines = list(plan(resolve(preset, [*words, "adapter.reduction=8"]), 1, 2, 80.0))
    values = each * 3 * (32 * 4 + 4 + 4 * 32 + 32) + WEIGHT
    sent = f"a round: each client sends {values * 4 / 1e6:.2f} MB"
    assert any(own.startswith(sent) for own in lines)
    wire = f"between the 2 slots: {values * (2 * 8 + 4) / 1e6:.2f} MB through MPI"
    assert any(own.startswith(wire) for own in lines)


@pytest.mark.parametrize(("keep", "end"), [("0.5", ""), ("lossless", ", whatever is chosen")])
def test_the_plan_counts_what_is_averaged_at_home(uneven, keep, end):
    words = [*uneven, "layers.score=last", f"layers.keep={keep}", "layers.sync_every=4"]
    every = f"every 4 rounds what stays home as well: {(A + B + WEIGHT) * 4 / 1e6:.2f} MB a client"
    lines = list(plan(resolve("lora-fedavg", words), 1, 2, 80.0))
    assert f"{every} (layers.sync_every){end}" in lines


@pytest.mark.parametrize(
    ("preset", "got"),
    [("fedex-lora", "{all}"), ("flora", "{anew}"), ("lora-fair", "{plain}"),
     ("flexlora", "at most {plain}"), ("delta-lora", "{all}")],
)  # fmt: skip
def test_what_the_plan_says_of_aggregation_rules(uneven, preset, got):
    """What a client sends and gets: residuals, of rank 64, are got and never sent."""
    lines = list(plan(resolve(preset, uneven), 1, 2, 80.0))
    residual = 3 * 64 * (32 + 32 + 32 + 16)
    values = {"plain": A + B + WEIGHT, "all": A + B + WEIGHT + residual, "anew": WEIGHT + residual}
    sizes = {name: f"{4 * value / 1e6:.2f} MB" for name, value in values.items()}
    assert any(f"client sends {'at most ' * (preset == 'flexlora')}{sizes['plain']}" in own
               for own in lines)  # fmt: skip
    (line,) = (own for own in lines if "aggregation.rule" in own)
    assert line.startswith(f"  and gets {got.format(**sizes)} (") and "the first rank" in line
    assert f"3 clients send, {3 * 4 * (A + B) / 1e6:.2f} MB" in line


def test_the_plan_of_clients_with_different_ranks(uneven):
    """Weights stand beside the values, and nobody sends more than all ranks."""
    words = [*uneven, "updates.transforms=[hetlora]"]
    lines = list(plan(resolve("lora-fedavg", words), 1, 2, 80.0))
    values = A + B + WEIGHT
    most = f"sends at most {values * 4 / 1e6:.2f} MB (all layers are shared), all 3 of them at most"
    assert any(most in own for own in lines)
    wire = values * (2 * 2 * 8 + 4) / 1e6
    assert any(own.startswith(f"between the 2 slots: {wire:.2f} MB") for own in lines)
