"""Which linear layers of a transformer's blocks get LoRA."""

from collections.abc import Collection
from typing import Any

from hpcfed.adapters.base import text_config
from hpcfed.errors import UserError

ALL = "all-linear"
# How attention's query and value are called where PEFT knows no targets; alone: in one layer.
_QUERY_VALUE = (
    ("query", "value"), ("q_proj", "v_proj"), ("q_lin", "v_lin"), ("query_proj", "value_proj"),
    ("q", "v"), ("query_key_value",), ("qkv_proj",), ("Wqkv",), ("c_attn",),
)  # fmt: skip


def choose(model: Any, legal: Collection[str], wanted: tuple[str, ...] | None) -> tuple[str, ...]:
    """Names of the layers to adapt, out of the legal ones. wanted: such names; ALL alone: every
    one; None: what PEFT takes for this architecture, or else attention's query and value.

    Raises UserError, listing the legal ones, for a name that is none of them, and where nothing is
    known of the architecture.
    """
    listed = ", ".join(sorted(legal))
    kind = type(model).__name__
    if wanted == (ALL,):
        return tuple(sorted(legal))
    for target in wanted or ():
        if target == ALL:
            raise UserError(f"adapter.targets: {ALL} stands for all of them; give it alone.")
        if target not in legal:
            raise UserError(
                f"adapter.targets names {target!r}, which {kind} does not have in its blocks; "
                f"legal targets: {listed}."
            )
    chosen = wanted or _usual(model, legal)
    if chosen is None:
        raise UserError(
            f"adapter.targets is not given, and nothing is known of {kind}; give {ALL}, or names "
            f"of linear layers; legal targets: {listed}."
        )
    return chosen


def _usual(model: Any, legal: Collection[str]) -> tuple[str, ...] | None:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    known = KNOWN.get(text_config(model).model_type)
    candidates = ((tuple(known),) if isinstance(known, list) else ()) + _QUERY_VALUE
    return next((names for names in candidates if set(names) <= set(legal)), None)
