"""An adapter as a folder that PEFT loads, or the adapter's own `load` where PEFT has none of its
kind."""

from pathlib import Path
from typing import Any

import torch

from hpcfed.adapters.base import Adapted
from hpcfed.storage.files import sync_file, write_json, write_tensors

# What PEFT calls the task of a model, by the class of transformers that loads it.
TASK_TYPES = {
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
}


def write_adapter(
    folder: Path,
    adapted: Adapted,
    values: torch.Tensor,
    fresh: dict[str, torch.Tensor],
    labels: tuple[str, ...],
    source: str,
    model_class: str,
) -> None:
    """Into an empty folder. values: (layout.size,) fp32. fresh: frozen weights that the checkpoint
    lacked; without them the adapter would be loaded over other random ones, so they are part of it.
    source: the base's name. model_class: the class of transformers that loads it.
    """
    tensors = adapted.saved(values)
    tensors |= {adapted.prefix + name: value.float() for name, value in fresh.items()}
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    if isinstance(adapted.description, dict):
        description = {**adapted.description, "base_model_name_or_path": source}
        write_json(folder / "adapter_config.json", description)
    else:
        model = adapted.network.inner
        _describe(folder, adapted.description, model, fresh, source, TASK_TYPES.get(model_class))
    for file in folder.iterdir():
        sync_file(file)
    write_json(folder / "labels.json", list(labels))


def _describe(
    folder: Path,
    config: Any,
    model: Any,
    fresh: dict[str, torch.Tensor],
    source: str,
    task: str | None,
) -> None:
    """adapter_config.json, from a peft.PeftConfig."""
    saved = list(config.modules_to_save or [])
    if config.task_type is None and task == "SEQ_CLS":
        # PEFT then takes the classifier as a whole, whatever of it is trained.
        tops = [name.partition(".")[0] for name in saved]
        held = (*fresh, *(f"{name}." for name in saved))
        if all(f"{top}.{name}".startswith(held) for top in tops
               for name, _ in model.get_submodule(top).named_parameters()):  # fmt: skip
            config.task_type, saved = task, tops
    else:
        config.task_type = config.task_type or task
    if config.task_type is None:  # the name of the class serves where PEFT has none for the task
        config.auto_mapping = {
            "base_model_class": type(model).__name__, "parent_library": type(model).__module__,
        }  # fmt: skip
    whole = tuple(f"{name}." for name in saved)
    parts = {name.rpartition(".")[0] for name in fresh if not name.startswith(whole)}
    config.modules_to_save = sorted({*saved, *parts})
    config.base_model_name_or_path = source
    config.inference_mode = True
    for name, value in vars(config).items():
        if isinstance(value, set):  # target_modules; a set's order differs from process to process
            setattr(config, name, sorted(value))
    config.save_pretrained(folder)
