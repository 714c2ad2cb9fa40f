"""Prompts made of each text: they act as the plain loader says, and that needs no hpcfed."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from hpcfed import model
from hpcfed.adapters.layout import HEAD, INPUT
from hpcfed.errors import UserError
from hpcfed.settings.config import Adapter, Config, Model
from hpcfed.storage.run import RunDirectory
from tests import models
from tests.support import ROOT

LABELS = ("a", "b", "c")
IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 10, 11, 0, 0]])
BATCH = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}
WHOLE = {name: value[:1] for name, value in BATCH.items()}  # no padding: some models make no mask
KINDS = ["idpg", "lpt"]
ALL = [*KINDS, "attempt"]
LOADER = ROOT / "examples" / "load_prompts.py"


def loader():
    spec = importlib.util.spec_from_file_location("load_prompts", LOADER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prepare(folder, kind, head="classifier", checkpointing=False, **options):
    """With values that are large enough for texts to make a difference."""
    if kind == "attempt" and "sources" not in options:
        options["sources"] = sources(folder)
    adapter = Adapter(kind=kind, virtual_tokens=3, reduction=4, **options)
    config = Config(
        model=Model(name=str(folder), head=head, gradient_checkpointing=checkpointing),
        adapter=adapter,
    )
    found = model.prepare(config, LABELS, 0, {})
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(found.adapted.layout.size, generator=generator) * 0.5
    for parameter, entry in zip(
        found.adapted.parameters, found.adapted.layout.entries, strict=True
    ):
        parameter.data.copy_(values[entry.values].view(entry.shape))
    return found, values


def sources(folder):
    """Two adapter folders of prompt tuning."""
    found = []
    for number in range(2):
        adapter = Adapter(kind="prompt", virtual_tokens=3)
        run = model.prepare(Config(model=Model(name=str(folder)), adapter=adapter), LABELS, 0, {})
        draw = torch.Generator().manual_seed(number)
        values = torch.randn(run.adapted.layout.size, generator=draw) * 3
        found.append(str(save(run, values, folder / f"source-{number}")))
    return tuple(found)


def save(found, values, folder):
    folder.mkdir(exist_ok=True)
    RunDirectory(folder).save_adapter(found.adapted, values, found.fresh, LABELS, found.source)
    return folder / "adapter"


@pytest.fixture(scope="module", params=models.ARCHITECTURES)
def place(request, tmp_path_factory):
    return models.save(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("kind", ALL)
def test_the_loader_gives_the_same_logits(place, kind, tmp_path):
    found, values = prepare(place, kind)
    folder = save(found, values, tmp_path)
    torch.manual_seed(99)  # other random weights wherever the checkpoint has none
    base = AutoModelForSequenceClassification.from_pretrained(place, num_labels=3).eval()
    base.config.pad_token_id = 0
    run = loader().load(base, folder)
    network = found.adapted.network.eval()
    for batch in (BATCH, WHOLE):
        with torch.no_grad():
            wanted = network(**batch)
        torch.testing.assert_close(run(**batch), wanted, rtol=1e-4, atol=1e-5)
    network.backbone.set_attn_implementation("eager")  # masks are numbers, not true or false
    with torch.no_grad():
        torch.testing.assert_close(network(**WHOLE), wanted, rtol=1e-4, atol=1e-5)
    # Dropout acts on no sentence vector, and the frozen model is in training again.
    assert found.adapted.network.train().backbone.training
    network(**BATCH)
    assert found.adapted.network.backbone.training


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_of_the_text_and_not_of_its_padding(place, kind):
    found, _ = prepare(place, kind)
    made = []
    found.adapted.network.prompts.generator.register_forward_hook(
        lambda module, args, output: made.append(output)
    )
    network = found.adapted.network.eval()
    with torch.no_grad():
        both = network(**BATCH)
        alone = network(**{name: value[1:, :3] for name, value in BATCH.items()})
    torch.testing.assert_close(both[1], alone[0], rtol=1e-4, atol=1e-5)
    assert made[0].shape == (2, 3, models.HIDDEN)
    assert float((made[0][0] - made[0][1]).norm()) > 0.01
    torch.testing.assert_close(made[0][1], made[1][0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_layout_and_initial_values(place, kind):
    found, _ = prepare(place, kind)
    layout = found.adapted.layout
    assert layout.blocks == (INPUT, HEAD)
    assert [(e.role, e.shape) for e in layout.entries[:4]] == [
        ("down", (8, 32)), ("down", (8,)), ("up", (96, 8)), ("up", (96,)),
    ]  # fmt: skip
    assert float(found.initial[layout.entries[3].values].std()) == pytest.approx(0.02, rel=0.3)
    assert not found.initial[layout.entries[1].values].any()
    trained = sum(p.numel() for p in found.adapted.network.parameters() if p.requires_grad)
    assert trained == layout.size


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_lpt_keeps_nothing_below_its_layer(place, layer):
    """Hidden states that enter a lower layer have no gradient, and are those of the text alone."""
    found, _ = prepare(place, "lpt", layer=layer)
    entered = []
    for block in found.adapted.blocks:
        block.register_forward_pre_hook(
            lambda m, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
    found.adapted.network.train()(**BATCH).sum().backward()
    assert [own.requires_grad for own in entered] == [index >= layer for index in range(3)]
    assert all(p.grad is not None and p.grad.any() for p in found.adapted.parameters)


@pytest.mark.parametrize("kind", ALL)
def test_checkpointing_changes_no_gradient(place, kind):
    gradients = []
    for checkpointing in (False, True):
        found, _ = prepare(place, kind, checkpointing=checkpointing)
        found.adapted.network.train()(**BATCH).square().sum().backward()
        gradients.append([parameter.grad for parameter in found.adapted.parameters])
    for plain, recomputed in zip(*gradients, strict=True):
        assert float(plain.norm()) > 0
        torch.testing.assert_close(plain, recomputed, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_a_language_model_fills_gaps(kind, tmp_path):
    models.save("bert", tmp_path / "model", "cloze")
    found, values = prepare(tmp_path / "model", kind, head="cloze")
    folder = save(found, values, tmp_path)
    run = loader().load(AutoModelForMaskedLM.from_pretrained(tmp_path / "model").eval(), folder)
    positions = torch.tensor([[3], [0]])
    with torch.no_grad():
        picked = found.adapted.network.eval()(positions=positions, **BATCH)
    wanted = run(**BATCH)[torch.arange(2), positions[:, 0]]
    torch.testing.assert_close(picked[:, 0], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [pytest.param("idpg", marks=pytest.mark.long), "lpt"])
def test_the_loader_needs_no_hpcfed(kind, tmp_path):
    """In a fresh process in which it cannot be imported."""
    place = models.save("bert", tmp_path / "model")
    found, values = prepare(place, kind)
    folder = save(found, values, tmp_path)
    texts = ["how far is the moon", "who wrote this"]
    tokenizer = models.tokenizer()
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = found.adapted.network.eval()(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        )
    program = (
        "import sys, runpy; sys.modules['hpcfed'] = None; "
        f"runpy.run_path({str(LOADER)!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), str(place), *texts],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    wanted = [f"{LABELS[int(n)]}\t{text}" for n, text in zip(logits.argmax(-1), texts, strict=True)]
    assert done.stdout.splitlines() == wanted
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["kind"] == f"hpcfed-{kind}" and config["layer"] == (1 if kind == "lpt" else None)


def test_sources_are_frozen_and_must_fit(place, tmp_path):
    """They are saved with the adapter, and each text has a mixture of its own."""
    found, values = prepare(place, "attempt")
    layout = found.adapted.layout
    assert layout.blocks == (INPUT, HEAD)
    assert [(e.role, e.shape) for e in layout.entries[:3]] == [
        ("prompt", (3, 32)), ("down", (8, 32)), ("up", (32, 8)),
    ]  # fmt: skip
    saved = found.adapted.saved(values)
    assert saved["sources"].shape == (2, 3, 32)
    assert layout.size == sum(p.numel() for p in found.adapted.parameters)
    (tmp_path / "adapter_config.json").write_text("{}")
    for content, said in (
        ({"prompt_embeddings": torch.zeros(4, 32)}, r"shape \[4, 32\], and here.*\[3, 32\]"),
        ({"other": torch.zeros(1)}, "holds no prompt, and here"),
    ):
        save_file(content, tmp_path / "adapter_model.safetensors")
        with pytest.raises(UserError, match=said):
            prepare(place, "attempt", sources=(str(tmp_path),))
    with pytest.raises(UserError, match=r"adapter\.sources: 'nowhere' is no adapter folder"):
        prepare(place, "attempt", sources=("nowhere",))


def test_a_layer_that_is_not_there(place):
    with pytest.raises(UserError, match="has no block of its own for layer 3"):
        prepare(place, "lpt", layer=3)
