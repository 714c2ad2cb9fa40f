"""The description of a sweep: what it may hold."""

from collections.abc import Mapping
from typing import Any

from hpcfed.app.jobs import CLUSTER, EXECUTORS
from hpcfed.errors import UserError

# What a description may hold, and its defaults.
_KEYS: dict[str, Any] = {
    "source": "",
    "folder": "",
    "executor": "slurm",
    "overrides": {},
    "grid": {},
    "list": [],
    "cluster": {},
}


def asks_for_gpus(spec: Mapping[str, Any]) -> bool:
    """Whether Slurm is to give its jobs GPUs, so that a run that sees none must not train."""
    return spec["executor"] == "slurm" and any(
        key.startswith(("gpus_per_node", "slurm_gpus"))
        or (key == "slurm_gres" and "gpu" in str(value))
        for key, value in spec["cluster"].items()
    )


def checked(description: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The description with defaults. Raises UserError for what it may not hold."""
    unknown = sorted(set(description) - set(_KEYS))
    if unknown:
        raise UserError(f"{name}: unknown key {unknown[0]!r}; legal here: {', '.join(_KEYS)}.")
    spec = {**_KEYS, **description}
    for key, default in _KEYS.items():
        if not isinstance(spec[key], type(default)):
            wanted = {"str": "a text", "dict": "keys and values", "list": "a list"}
            raise UserError(
                f"{name}: {key} must be {wanted[type(default).__name__]}, not {spec[key]!r}."
            )
    for key in ("source", "folder"):
        if not spec[key]:
            raise UserError(f"{name}: {key} is missing; see docs/sweeps.md.")
    if spec["executor"] not in EXECUTORS:
        raise UserError(
            f"{name}: executor is {spec['executor']!r}; choose one of: {', '.join(EXECUTORS)}."
        )
    for key, values in spec["grid"].items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{name}: grid.{key} must be a list of values, not {values!r}.")
    if not all(isinstance(item, dict) for item in spec["list"]):
        raise UserError(f"{name}: each item of list must be keys and values.")
    for part in (spec["overrides"], spec["grid"], *spec["list"]):
        wrong = next((key for key in part if not isinstance(key, str)), None)
        if wrong is not None:
            raise UserError(f"{name}: {wrong!r} is no option; write section.key.")
        if "output" in part:
            raise UserError(
                f"{name}: output is not a sweep's to set, since each run needs its own: it is "
                "folder/<name of the run>; leave it out, and set folder."
            )
    check_cluster(spec["cluster"], name)
    return spec


def check_cluster(cluster: Mapping[str, Any], name: str) -> None:
    """Raises UserError for what `cluster` may not hold. name: of the file, for messages."""
    for key in cluster:
        if key not in CLUSTER and not key.startswith(("slurm_", "gpus_per_node", "mem_gb")):
            raise UserError(
                f"{name}: unknown key cluster.{key}; legal here: {', '.join(CLUSTER)}, "
                "gpus_per_node, mem_gb, and submitit's own, which begin with slurm_."
            )
    for key in CLUSTER:
        value = cluster.get(key, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(
                f"{name}: cluster.{key} is {value!r}; it must be a whole number, at least 1."
            )
