"""Backbone and tokenizer; sharded under ZeRO-3 while it is loaded."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hpcfed import fitting, quantized, registry
from hpcfed.adapters import start
from hpcfed.adapters.base import (
    Adapted,
    final_linear,
    full_shape,
    text_config,
    transformer_blocks,
)
from hpcfed.adapters.layout import HEAD
from hpcfed.adapters.network import recompute
from hpcfed.checkpoints import resolve_name, rounding
from hpcfed.errors import UserError, reason
from hpcfed.objectives.heads import Classifier, Head
from hpcfed.rng import generator
from hpcfed.settings.config import Config
from hpcfed.settings.deepspeed_config import zero_stage


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
    rounded: str = ""  # what has to be said with every figure of it
    notes: tuple[str, ...] = ()  # what else a person should know of it


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
    fitting.check_tokenizer(tokenizer, config.model.name)
    return tokenizer


def _attention(config: Config) -> dict[str, str]:
    """What transformers is told of attention, if anything."""
    chosen = config.model.attention
    return {} if chosen == "auto" else {"attn_implementation": chosen}


def _unreachable(config: Config, what: str, error: Exception) -> UserError:
    if _attention(config) and "attention" in str(error).lower():
        return UserError(
            f"model.attention={config.model.attention}: transformers has it not for "
            f"{config.model.name!r} here ({reason(error)}); use model.attention=auto."
        )
    detail = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return UserError(
        f"model.name: could not load the {what} of {config.model.name!r} ({detail}); give a hub "
        "id that can be reached, a folder, pkg:package/folder, or a GGUF file."
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
    import peft

    rounded = rounding(resolve_name(config.model.name))  # converted here, if need be, and whole
    rounded = "; ".join(filter(None, (rounded, quantized.said(config))))
    with _sharded_at_load(ds_settings):
        model, lacking, classes = _load(config, labels, pad_id)
        trained = _trained_head(config, model, labels)
        blocks = transformer_blocks(model)
        missing = [name for name in lacking if not trained or not name.startswith(f"{trained}.")]
        _refuse_holes(config, model, missing, blocks)
        fitting.check_length(config, model)
        parameters = dict(model.named_parameters())  # by their names before PEFT's
        fresh = _draw_missing(parameters, missing, config.seed, _std(model))
        # PEFT takes each module whose name ends like the head's for a part of it, and wants it too.
        for name, parameter in parameters.items() if trained else ():
            module = name.rpartition(".")[0]
            if module != trained and module.endswith(str(trained)) and name not in fresh:
                fresh[name] = _read(parameter)
        kept, notes = None, list[str]()
        if trained and len(missing) == len(lacking):
            kept, said = _kept_head(model.get_submodule(trained), labels, classes)
            notes.append(said)
        adapted = _adapt(config, model, blocks, trained, pad_id)
        if trained and isinstance(adapted.description, peft.PromptLearningConfig):
            # Of what it calls the classifier PEFT then takes all, and the checkpoint's of nothing.
            top, own = trained.partition(".")[0], f"{trained}."
            for name, parameter in parameters.items():
                if name.startswith(f"{top}.") and not name.startswith(own) and name not in fresh:
                    fresh[name] = _read(parameter)
        initial = adapted.initial(config.seed)
        if kept is not None:
            initial[adapted.layout.span(HEAD)] = kept
        if config.adapter.start is not None:
            found = start.read(config.adapter.start)
            notes += start.begin_from(found, adapted, initial, labels)
            for name in fresh.keys() & {n.removeprefix(adapted.prefix) for n in found.tensors}:
                fresh[name] = found.tensors[adapted.prefix + name].to(fresh[name].dtype)
                _write(parameters[name], fresh[name])
        if config.model.gradient_checkpointing:
            recompute(adapted.blocks)
    values = sum(map(quantized.values, adapted.network.parameters()))
    bare = set(blocks.values()) - set(adapted.layout.layers)
    if bare and config.adapter.kind in ("lora", "adalora"):
        notes.append(
            f"{len(bare)} of {len(set(blocks.values()))} transformer blocks have none of "
            "adapter.targets, and no LoRA"
        )
    return Prepared(
        adapted,
        head or Classifier(),
        initial,
        fresh,
        config.model.name,
        values - adapted.layout.size,
        config.model.gradient_checkpointing,
        rounded,
        tuple(notes),
    )


def outline(config: Config, labels: tuple[str, ...], pad_id: int) -> Adapted:
    """The adapted model with shapes but no values (on torch's meta device): nothing is loaded.

    Raises UserError for a model that cannot be found or adapted.
    """
    auto, hf_config, dtype, _ = _described(config, labels, pad_id)
    with torch.device("meta"):
        try:
            model = auto.from_config(hf_config, dtype=dtype, **_attention(config))
        except Exception as error:  # transformers raises many unrelated types here
            raise _unreachable(config, "model", error) from None
        _drop(model, config.model.dropout)
        trained = _trained_head(config, model, labels)
        blocks = transformer_blocks(model)
        fitting.check_length(config, model)
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
    import peft

    adapt = registry.ADAPTERS[config.adapter.kind]
    try:
        adapted: Adapted = adapt(model, config.adapter, blocks, trained, _std(model), pad_id)
    except UserError:
        raise
    except Exception as error:  # what an architecture lacks shows in many ways
        raise UserError(
            f"adapter.kind={config.adapter.kind} cannot be put on {type(model).__name__} "
            f"({reason(error)}); use another adapter.kind, or another model."
        ) from error
    if registry.OBJECTIVES[config.model.head].model_class == "AutoModelForCausalLM" and isinstance(
        adapted.description, peft.LoraConfig
    ):
        adapted.description.task_type = "CAUSAL_LM"
    return adapted


def _std(model: Any) -> float:
    """Of the values that are drawn where the checkpoint has none."""
    return float(getattr(text_config(model), "initializer_range", 0.02))


def _kept_head(
    owner: nn.Module, labels: tuple[str, ...], classes: tuple[str, ...]
) -> tuple[torch.Tensor | None, str]:
    """The values of a head that the checkpoint holds, in the order of our labels; None where its
    classes, by their names, are not our labels. And what to say of it."""
    if sorted(classes) != sorted(labels):
        named = ", ".join(classes)[:80]
        return None, (
            f"the checkpoint's classifier of {len(classes)} classes ({named}) is drawn anew: its "
            "classes are not named as the labels of the task"
        )
    order = [classes.index(label) for label in labels]
    values = [_read(parameter)[order].float().flatten() for parameter in owner.parameters()]
    return torch.cat(values), "the checkpoint's classifier of the same classes is kept"


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
) -> tuple[Any, Any, torch.dtype, tuple[str, ...]]:
    """The model's class, its configuration, its type, and the classes that its checkpoint names."""
    import transformers

    source = resolve_name(config.model.name)
    objective = registry.OBJECTIVES[config.model.head]
    auto = getattr(transformers, objective.model_class)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.model.dtype]
    try:
        hf_config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # transformers raises many unrelated types here
        raise _unreachable(config, "model", error) from None
    if type(hf_config) not in auto._model_mapping:
        raise UserError(
            f"model.head={config.model.head} needs a model that transformers has as "
            f"{objective.model_class}, and {config.model.name!r} ({hf_config.model_type}) is none; "
            "give another model, or another model.head."
        )
    fitting.check_padding(hf_config, pad_id, config.model.name)
    classes = tuple(str(name) for name in (hf_config.id2label or {}).values())
    if objective.trains_head:
        hf_config.num_labels = len(labels)
        hf_config.id2label = dict(enumerate(labels))
        hf_config.label2id = {name: index for index, name in enumerate(labels)}
    for part in {id(own): own for own in (hf_config, hf_config.get_text_config())}.values():
        rates = dict(vars(part)) if config.model.dropout is not None else {}
        for attribute, value in rates.items():
            named = "dropout" in attribute or attribute.endswith("pdrop")
            if named and isinstance(value, float | int) and not isinstance(value, bool):
                setattr(part, attribute, config.model.dropout)
        part.pad_token_id = pad_id
    hf_config.use_cache = False
    return auto, hf_config, dtype, classes


def _drop(model: nn.Module, dropout: float | None) -> None:
    """Set every dropout of a model: modules, and rates that attention keeps as numbers."""
    if dropout is None:
        return
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = dropout
        for attribute, value in vars(module).items():
            if isinstance(value, float) and "drop" in attribute and "layer" not in attribute:
                setattr(module, attribute, dropout)


def _load(
    config: Config, labels: tuple[str, ...], pad_id: int
) -> tuple[Any, list[str], tuple[str, ...]]:
    """The model, the names of the parameters that its checkpoint lacks, or has of another number of
    classes, and the classes that it names."""
    auto, hf_config, dtype, classes = _described(config, labels, pad_id)
    try:
        model, report = auto.from_pretrained(
            resolve_name(config.model.name),
            config=hf_config,
            dtype=dtype,
            **_attention(config),
            **quantized.loading(config, dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # transformers raises many unrelated types here
        raise _unreachable(config, "model", error) from None
    head = _trained_head(config, model, labels)
    other = sorted(name for name, *_ in report["mismatched_keys"])
    for name in other:
        if head is None or not name.startswith(f"{head}."):
            raise UserError(
                f"model.name: {name} in the checkpoint {config.model.name!r} has another shape "
                "than its config.json says; give a checkpoint whose parts belong together."
            )
    _drop(model, config.model.dropout)
    return model, sorted({*report["missing_keys"], *other}), classes


def _draw_missing(
    parameters: dict[str, nn.Parameter], names: list[str], seed: int, std: float
) -> dict[str, torch.Tensor]:
    """Seeded values for frozen weights that the checkpoint lacks; also returned, for export."""
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


def _read(parameter: nn.Parameter) -> torch.Tensor:
    """A parameter's values, whole."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach().clone().cpu()
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone().cpu()


def _write(parameter: nn.Parameter, value: torch.Tensor) -> None:
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)
    else:
        parameter.data.copy_(value)
