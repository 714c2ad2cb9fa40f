"""A frozen backbone of which linear layers hold 4 bits a value, by bitsandbytes.

NF4 (Dettmers et al. 2023, QLoRA): each block of 64 values is rounded to 16 levels and keeps one
scale, which is rounded to 8 bits itself (double quantization). Each forward and backward makes the
values anew, in the type of the model; LoRA beside them is trained in that type.
"""

import importlib.util
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from hpcfed.errors import UserError
from hpcfed.settings.config import Config
from hpcfed.settings.deepspeed_config import zero_stage

if TYPE_CHECKING:
    from torch import nn

# Bits a value: its level, its block's scale, and the scale of 256 of those.
BITS = 4 + 8 / 64 + 32 / (64 * 256)


def check(config: Config, settings: dict[str, Any]) -> None:
    """Raises UserError where the backbone cannot be held in 4 bits. settings: DeepSpeed's."""
    if config.model.quantize == "none":
        return
    said = f"model.quantize={config.model.quantize}"
    if config.adapter.kind != "lora":
        raise UserError(
            f"{said} goes with adapter.kind=lora, not {config.adapter.kind}; leave it out, or use "
            "lora."
        )
    if zero_stage(settings) == 3:
        raise UserError(
            f"{said}: ZeRO-3 cannot share out weights that are packed; use "
            "deepspeed=ds_configs/zero2.json."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"{said} takes the package bitsandbytes; install it with "
            "`pip install 'hpcfed[quantize]'`."
        )


def loading(config: Config, dtype: Any) -> dict[str, Any]:
    """What transformers is told when it loads the weights. dtype: of the model."""
    if config.model.quantize == "none":
        return {}
    from transformers import BitsAndBytesConfig

    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    }


def packed(blocks: "Iterable[nn.Module]") -> int:
    """Values of a backbone that would be held in 4 bits: its blocks' matrices."""
    return sum(
        parameter.numel()
        for block in blocks
        for name, parameter in block.named_parameters()
        if parameter.ndim == 2 and "lora_" not in name
    )


def said(config: Config) -> str:
    """What has to be said with every figure of such a model; empty for any other."""
    if config.model.quantize == "none":
        return ""
    return "its frozen linear layers are rounded to 4 bits (nf4): figures are of that model"


def values(parameter: Any) -> int:
    """How many values a parameter stands for; sharded or packed, it holds fewer."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        return int(state.shape.numel())
    return int(getattr(parameter, "ds_numel", parameter.numel()))
