"""One plain DeepSpeed JSON plus what the configuration rules: batch size, clipping, precision.

The JSON says how a client fits on its GPUs (ZeRO stage, offload, buckets). What the method needs
comes from the configuration; a JSON that fights it is refused, never silently overruled.
"""

import json
from pathlib import Path
from typing import Any

from hpcfed.errors import UserError
from hpcfed.settings.config import Config
from hpcfed.settings.shipped import folder

_RULED = {
    "train_batch_size": "local.batch_size",
    "train_micro_batch_size_per_gpu": "local.micro_batch",
    "gradient_accumulation_steps": "local.micro_batch",
    "gradient_clipping": "local.clip",
    "optimizer": "local.optimizer",
    "scheduler": "local.lr",
}


def zero_stage(settings: dict[str, Any]) -> int:
    """The ZeRO stage (0-3) of a DeepSpeed configuration."""
    return int(settings.get("zero_optimization", {}).get("stage", 0))


def locate(name: str) -> Path:
    """The JSON file: as given, or the one that hpcfed ships under the name ds_configs/..., so that
    a run may start in any folder."""
    own, shipped = Path(name), folder("ds_configs")
    if own.is_file():
        return own
    if own.parent == Path(shipped.name) and (shipped / own.name).is_file():
        return shipped / own.name
    names = ", ".join(f"ds_configs/{path.name}" for path in sorted(shipped.glob("*.json")))
    raise UserError(f"deepspeed: the file {name!r} does not exist; there are: {names}.")


def load(config: Config) -> dict[str, Any]:
    """The complete DeepSpeed configuration of one client.

    Raises UserError if the file is missing, is no JSON object, or fights the configuration.
    """
    path = locate(config.deepspeed)
    try:
        settings = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}).") from None
    if not isinstance(settings, dict) or not isinstance(
        settings.get("zero_optimization", {}), dict
    ):
        raise UserError(
            f"{path}: must be a JSON object, with zero_optimization as an object in it."
        )
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


def _refuse_conflicts(path: Path, settings: dict[str, Any], config: Config) -> None:
    for key, ruler in _RULED.items():
        if settings.get(key, "auto") != "auto":
            raise UserError(f"{path} sets {key}, which {ruler} rules; remove it from the JSON.")
    zero = settings.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage is {stage!r}; it must be 0, 1, 2 or 3.")
    if _enabled(settings, "fp16"):
        raise UserError(f"{path} enables fp16, which is not supported; use model.dtype=bf16.")
    if _enabled(settings, "bf16") and config.model.dtype != "bf16":
        raise UserError(
            f"{path} enables bf16 but model.dtype is {config.model.dtype}; set model.dtype=bf16."
        )
    if config.model.dtype == "bf16" and stage == 0:
        raise UserError(
            f"model.dtype=bf16 needs ZeRO stage 1, 2 or 3, which keep an fp32 master copy; {path} "
            "has stage 0."
        )
    for key in ("zero_hpz_partition_size", "mics_shard_size"):
        if zero.get(key, 1) not in (1, -1):
            raise UserError(
                f"{path} sets {key}: a client is sharded over all its ranks; remove it."
            )
    if zero.get("offload_optimizer", {}).get("ratio", 1) != 1 or "zenflow" in zero:
        raise UserError(
            f"{path}: partial optimizer offload (ratio, zenflow) steps a second optimizer that "
            "knows nothing of clients; remove it."
        )
    for key in ("offload_optimizer", "offload_param"):
        if zero.get(key, {}).get("device") == "nvme":
            raise UserError(f"{path}: {key} to nvme is not supported; use device cpu.")


def _enabled(settings: dict[str, Any], key: str) -> bool:
    return settings.get(key, {}).get("enabled", False) is True
