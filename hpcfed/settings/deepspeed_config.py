"""One plain DeepSpeed JSON plus what the configuration rules: batch size, clipping, precision.

The JSON says how a client fits on its GPUs (ZeRO stage, offload, buckets). What the method needs
comes from the configuration; a JSON that fights it is refused, never silently overruled.
"""

import copy
import json
import os
from pathlib import Path
from typing import Any

from hpcfed.errors import UserError
from hpcfed.settings import deepspeed_keys
from hpcfed.settings.config import Config
from hpcfed.settings.deepspeed_keys import Key
from hpcfed.settings.reading import shown
from hpcfed.settings.shipped import folder
from hpcfed.settings.values import nearest
from hpcfed.storage.paths import home

_RULED = {
    "train_batch_size": "local.batch_size",
    "train_micro_batch_size_per_gpu": "local.micro_batch",
    "gradient_accumulation_steps": "local.micro_batch",
    "gradient_clipping": "local.clip",
    "optimizer": "local.optimizer",
    "scheduler": "local.lr",
    "amp": "model.dtype",
    "bfloat16": "model.dtype",  # the old name of bf16
    "torch_autocast": "model.dtype",
    "activation_checkpointing": "model.gradient_checkpointing",
}
# What else may stand in it: sections, with the class that DeepSpeed reads each by, and values.
_SECTIONS = {
    "zero_optimization": ("runtime/zero/config.py", "DeepSpeedZeroConfig"),
    "bf16": ("runtime/precision_config.py", "DeepSpeedBF16Config"),
    "fp16": ("runtime/precision_config.py", "DeepSpeedFP16Config"),
    "comms_logger": ("comm/config.py", "CommsLoggerConfig"),
}
_VALUES = {
    "communication_data_type": Key(choices=("fp32", "bf16")),
    "data_types": Key(section={"grad_accum_dtype": Key(choices=("fp32", "bf16"))}),
    "prescale_gradients": Key(("bool",)),
    "gradient_predivide_factor": Key(("float",), {"gt": 0}),
    "steps_per_print": Key(("int",)),
    "wall_clock_breakdown": Key(("bool",)),
    "memory_breakdown": Key(("bool",)),
    "dump_state": Key(("bool",)),
    "zero_allow_untested_optimizer": Key(choices=(True,)),
    "zero_force_ds_cpu_optimizer": Key(choices=(False,)),
}


def zero_stage(settings: dict[str, Any]) -> int:
    """The ZeRO stage (0-3) of a DeepSpeed configuration."""
    return int(settings.get("zero_optimization", {}).get("stage", 0))


def locate(name: str) -> Path:
    """The JSON file: as given, or the one that hpcfed ships under the name ds_configs/..., so that
    a run may start in any folder."""
    own, shipped = home(name), folder("ds_configs")
    if os.path.isfile(own):
        return own
    if own.parent == Path(shipped.name) and os.path.isfile(shipped / own.name):
        return shipped / own.name
    if os.path.isdir(own):
        raise UserError(f"deepspeed: {name!r} is a folder; name a JSON file in it.")
    names = ", ".join(f"ds_configs/{path.name}" for path in sorted(shipped.glob("*.json")))
    raise UserError(f"deepspeed: the file {name!r} does not exist; there are: {names}.")


def load(config: Config) -> dict[str, Any]:
    """The complete DeepSpeed configuration of one client.

    Raises UserError if the file is missing, is no JSON object, holds what DeepSpeed does not know,
    or fights the configuration.
    """
    path = locate(config.deepspeed)
    settings = _read(path)
    _refuse_unknown(path, settings)
    _refuse_conflicts(path, settings, config)
    settings = {key: value for key, value in settings.items() if key not in _RULED}  # "auto"
    ranks = config.cluster.ranks_per_client
    micro = config.local.micro_batch or -(-config.local.batch_size // ranks)
    settings |= {
        # Micro-steps are counted by the client itself, which ragged last batches need: to DeepSpeed
        # every micro-step looks like a step of its own until the boundary is set.
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": 1,
        "train_batch_size": micro * ranks,
        "gradient_clipping": config.local.clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    if config.model.dtype == "bf16":
        settings["bf16"] = {**settings.get("bf16", {}), "enabled": True}
    return settings


def _read(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError if it holds anything else."""
    try:
        settings = json.loads(
            path.read_text(encoding="utf-8-sig"),
            object_pairs_hook=_once,
            parse_constant=_no_number,
        )
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 (byte {error.start}); save it in that encoding."
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}).") from None
    except ValueError as error:  # a key twice; a number of thousands of digits
        raise UserError(f"{path}: not valid JSON ({str(error).split(';')[0]}).") from None
    except RecursionError:
        raise UserError(f"{path}: not valid JSON (it nests too deep).") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: must be a JSON object, as in ds_configs/zero2.json.")
    return settings


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"the key {shown(key)} is given twice")
    return dict(pairs)


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no number")


def _refuse_unknown(path: Path, settings: dict[str, Any]) -> None:
    """Raises UserError for keys and values that DeepSpeed would not take, or would pass over."""
    zero = settings.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else 0
    for name, value in settings.items():
        if name in _SECTIONS:
            deepspeed_keys.check(
                f"{path}: {name}", value, deepspeed_keys.known(*_SECTIONS[name]), stage
            )
        elif name in _VALUES:
            deepspeed_keys.check(str(path), {name: value}, _VALUES, stage)
        elif name not in _RULED:
            legal = [*_SECTIONS, *_VALUES]
            raise UserError(
                f"{path}: {shown(name)} has no place in a client's DeepSpeed configuration;"
                f"{nearest(name, legal)} legal here: {', '.join(legal)}."
            )
    for name, least in (("offload_param", 3), ("offload_optimizer", 1)):
        if zero.get(name) is not None and stage < least:
            raise UserError(
                f"{path}: zero_optimization.{name} has no effect at ZeRO stage {stage}, but from "
                f"{least} on; remove it, or set the stage."
            )


def verify(settings: dict[str, Any]) -> None:
    """Let DeepSpeed itself read the complete configuration, before a model is loaded. Where slots
    are joined, since DeepSpeed has been imported there.

    Raises UserError for what it does not take.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        DeepSpeedConfig(copy.deepcopy(settings))
    except (ValueError, TypeError, AttributeError, AssertionError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"DeepSpeed does not take the JSON of `deepspeed`: {said}") from None


def _refuse_conflicts(path: Path, settings: dict[str, Any], config: Config) -> None:
    for key, ruler in _RULED.items():
        if settings.get(key, "auto") != "auto":
            raise UserError(f"{path} sets {key}, which {ruler} rules; remove it from the JSON.")
    zero = settings.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if _enabled(settings, "fp16"):
        raise UserError(f"{path} enables fp16, which is not supported; use model.dtype=bf16.")
    if _enabled(settings, "bf16") and config.model.dtype != "bf16":
        raise UserError(
            f"{path} enables bf16 but model.dtype is {config.model.dtype}; set model.dtype=bf16."
        )
    if config.model.dtype == "bf16" and settings.get("bf16", {}).get("enabled", True) is False:
        raise UserError(
            f"{path} disables bf16 but model.dtype is bf16; remove it from the JSON, or set "
            "model.dtype=fp32."
        )
    for key in ("bf16_master_weights_and_grads", "bf16_optimizer_states"):
        if settings.get("bf16", {}).get(key):
            raise UserError(
                f"{path} sets bf16.{key}: a client's master values and moments are fp32, since "
                "they are what is aggregated; remove it."
            )
    accumulated = settings.get("data_types", {}).get("grad_accum_dtype")
    if config.model.dtype == "fp32" and "bf16" in (
        accumulated,
        settings.get("communication_data_type"),
    ):
        raise UserError(
            f"{path} adds gradients up in bf16, another precision than model.dtype=fp32; remove "
            "communication_data_type and grad_accum_dtype."
        )
    if config.model.dtype == "bf16" and stage == 0:
        raise UserError(
            f"model.dtype=bf16 needs ZeRO stage 1, 2 or 3, which keep an fp32 master copy; {path} "
            "has stage 0."
        )
    for key in (name for name in zero if name.startswith("zero_quantized") and zero[name]):
        raise UserError(
            f"{path} sets zero_optimization.{key}, another precision than model.dtype="
            f"{config.model.dtype}; remove it."
        )
    for key in ("zero_hpz_partition_size", "mics_shard_size"):
        if zero.get(key, 1) not in (1, -1):
            raise UserError(
                f"{path} sets {key}: a client is sharded over all its ranks; remove it."
            )
    if (zero.get("offload_optimizer") or {}).get("ratio", 1) != 1 or zero.get("zenflow"):
        raise UserError(
            f"{path}: partial optimizer offload (ratio, zenflow) steps a second optimizer that "
            "knows nothing of clients; remove it."
        )
    for key in ("offload_optimizer", "offload_param"):
        if (zero.get(key) or {}).get("device") == "nvme":
            raise UserError(f"{path}: {key} to nvme is not supported; use device cpu.")


def _enabled(settings: dict[str, Any], key: str) -> bool:
    return settings.get(key, {}).get("enabled", False) is True
