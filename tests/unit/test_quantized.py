"""A backbone in 4 bits, by bitsandbytes itself, on the CPU."""

import dataclasses

import pytest
import torch
from torch import nn

from hpcfed import model, quantized
from hpcfed.errors import UserError
from hpcfed.settings.resolve import resolve
from tests import models


def config(folder, *extra):
    words = [f"model.name={folder}/model", "model.head=completion", *extra]
    return resolve("lora-fedavg", words).config


def test_it_is_refused_without_bitsandbytes(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"takes the package bitsandbytes; install .*\[quantize\]"):
        quantized.check(config(tmp_path, "model.quantize=nf4"), {})
    quantized.check(config(tmp_path), {})


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_frozen_values_are_those_of_its_16_levels(tmp_path, dtype):
    """The model is the plain one whose matrices hold, of each, what was made of its 4 bits; LoRA
    starts with the same bits and gets the same gradients."""
    bnb = pytest.importorskip("bitsandbytes", reason="pip install 'hpcfed[quantize]'")
    models.save("llama", tmp_path / "model", "completion", hidden_size=64)
    own = config(tmp_path, f"model.dtype={dtype}", "model.quantize=nf4")
    plain = dataclasses.replace(own, model=dataclasses.replace(own.model, quantize="none"))
    packed, whole = model.prepare(own, (), 0, {}), model.prepare(plain, (), 0, {})
    assert packed.backbone_values == whole.backbone_values and "nf4" in packed.rounded
    assert packed.adapted.layout == whole.adapted.layout
    assert torch.equal(packed.initial, whole.initial)
    rounded = 0
    modules = dict(whole.adapted.network.named_modules())
    for name, module in packed.adapted.network.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            made = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            weight = modules[name].weight
            assert isinstance(modules[name], nn.Linear) and made.shape == weight.shape
            assert 0.01 < (made - weight).norm() / weight.norm() < 0.15
            assert all(len(block.unique()) <= 16 for block in made.reshape(-1, 64))
            weight.data.copy_(made)
            rounded += weight.numel()
    assert rounded / 64 > 1000
    ids = torch.randint(5, 400, (2, 20), generator=torch.Generator().manual_seed(0))
    found = []
    for each in (packed, whole):
        for parameter in each.adapted.parameters:
            parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
        logits = each.adapted.network(input_ids=ids, attention_mask=torch.ones_like(ids)).float()
        logits.logsumexp(-1).sum().backward()
        gradients = [p.grad for p in each.adapted.parameters if p.grad is not None]
        assert len(gradients) == len(each.adapted.parameters)
        gradient = torch.cat([own.float().flatten() for own in gradients])
        found.append((logits, gradient))
    for got, wanted in zip(*found, strict=True):
        assert (got - wanted).norm() / wanted.norm() < (1e-4 if dtype == "fp32" else 3e-2)
