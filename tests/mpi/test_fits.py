"""A model of 340M values fits: ZeRO-3 shards it while it is loaded, and the adapter survives."""

import pytest
from safetensors.torch import load_file

from benchmarks import memory


@pytest.mark.long
def test_a_large_backbone_is_sharded_at_load(tmp_path):
    memory.make_model(tmp_path)
    result = memory.run_case(tmp_path, "bf16", "zero3", ranks=2)
    assert result["backbone"] > 330e6
    assert result["held"] <= 0.55
    assert result["exact"], "LoRA values must round-trip, and training must move them"
    # bf16: the whole backbone would be 2 bytes a value on every rank, without anything else.
    assert result["load"] * 1e9 < 0.8 * 2 * result["backbone"]
    adapter = load_file(tmp_path / "bf16-zero3" / "adapter" / "adapter_model.safetensors")
    lora = {name: value for name, value in adapter.items() if "lora_" in name}
    assert len(lora) == 26 * 2 * 2
    assert all(value.numel() > 0 and bool(value.any()) for value in lora.values())
