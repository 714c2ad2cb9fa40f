"""A warm start: the values of an adapter folder, a run's or PEFT's own, as those to start from."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hpcfed.adapters.base import Adapted
from hpcfed.adapters.layout import HEAD
from hpcfed.errors import UserError

# What has to be the same: with another value of it the same tensors are another function.
_SAME = (
    "peft_type", "r", "init_r", "lora_alpha", "use_rslora", "use_dora", "num_virtual_tokens",
    "prefix_projection",
)  # fmt: skip
_SAME_OF_OURS = ("kind", "placement", "reduction", "width", "virtual_tokens", "layer")
_COLUMNS = "prompt_embeddings"


@dataclass(frozen=True)
class Saved:
    """What an adapter folder holds."""

    folder: str
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    labels: list[str] | None


def read(folder: str, option: str = "adapter.start") -> Saved:
    """An adapter folder. Raises UserError, which names the option, if it is none, or cannot be
    read."""
    from safetensors.torch import load_file

    path = Path(folder).expanduser()
    try:
        config = json.loads((path / "adapter_config.json").read_text())
        tensors = load_file(path / "adapter_model.safetensors")
        labels = path / "labels.json"
        named = json.loads(labels.read_text()) if labels.is_file() else None
    except Exception as error:  # safetensors raises a type of its own
        raise UserError(
            f"{option}: {folder!r} is no adapter folder that can be read ({error}); give one "
            "with adapter_config.json and adapter_model.safetensors."
        ) from None
    return Saved(folder, config, tensors, named)


def begin_from(
    saved: Saved, adapted: Adapted, initial: torch.Tensor, labels: tuple[str, ...]
) -> list[str]:
    """Write its values into `initial` (layout.size,); a classifier only where it is of the same
    labels. Returns what to say of it.

    Raises UserError for an adapter of another kind or shape.
    """
    ours = adapted.description
    wanted = ours if isinstance(ours, dict) else ours.to_dict()
    for key in _SAME_OF_OURS if isinstance(ours, dict) else _SAME:
        mine, theirs = wanted.get(key), saved.config.get(key)
        if (theirs or None) != (getattr(mine, "value", mine) or None):
            raise UserError(
                f"adapter.start: {saved.folder!r} has {key}={theirs} and this run's adapter "
                f"{getattr(mine, 'value', mine)}; set the options of adapter as they were there."
            )
    tensors = dict(saved.tensors)
    layers = [entry for entry in adapted.layout.trained.entries if entry.block != HEAD]
    if adapted.columns and _COLUMNS in tensors:
        whole = tensors.pop(_COLUMNS)
        widths = [entry.size // entry.shape[0] for entry in layers]
        if whole.shape == (layers[0].shape[0], sum(widths)):
            tensors |= {
                entry.name: part.reshape(entry.shape)
                for entry, part in zip(layers, torch.split(whole, widths, dim=1), strict=True)
            }
    for entry in layers:
        value = tensors.get(entry.name)
        if value is None or tuple(value.shape) != entry.shape:
            raise UserError(
                f"adapter.start: {saved.folder!r} holds no {entry.name} of shape "
                f"{list(entry.shape)}; give an adapter of the same model and the same options."
            )
        initial[entry.values] = value.float().flatten()
    head = [entry for entry in adapted.layout.entries if entry.block == HEAD]
    same = saved.labels is None or saved.labels == list(labels)
    found = [tensors.get(entry.name) for entry in head]
    if not same or any(
        value is None or tuple(value.shape) != entry.shape
        for value, entry in zip(found, head, strict=True)
    ):
        return [f"starts from {saved.folder}, with a classifier drawn anew: its labels are others"]
    for value, entry in zip(found, head, strict=True):
        assert value is not None
        initial[entry.values] = value.float().flatten()
    return [f"starts from {saved.folder}"]
