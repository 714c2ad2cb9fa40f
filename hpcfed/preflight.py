"""Everything that can be refused without torch, a model or a GPU: within a second, before anything
starts and before anything is written."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcfed import deepspeed_config
from hpcfed.config import Config
from hpcfed.data import partition, sources
from hpcfed.data.partition import ClientRows
from hpcfed.data.sources import TaskData
from hpcfed.data.wordings import wording
from hpcfed.errors import UserError
from hpcfed.resolve import Resolved


@dataclass(frozen=True)
class Checked:
    """A configuration whose launch, DeepSpeed JSON, run directory and data are sound."""

    resolved: Resolved
    settings: dict[str, Any]  # complete DeepSpeed configuration of a client
    output: Path
    task: TaskData
    rows: list[ClientRows]

    @property
    def config(self) -> Config:
        """The configuration itself."""
        return self.resolved.config


def check(resolved: Resolved, ranks: int) -> Checked:
    """Check and load what a run on `ranks` MPI ranks needs besides its model.

    Raises UserError for the first fault found.
    """
    config = resolved.config
    check_ranks(ranks, config.cluster.ranks_per_client)
    spec = config.federation
    if spec.per_round > spec.clients:
        raise UserError(
            f"federation.per_round is {spec.per_round} but federation.clients is {spec.clients}; "
            "no more can be sampled than there are."
        )
    if config.curriculum.warmup >= spec.rounds:
        raise UserError(
            f"curriculum.warmup is {config.curriculum.warmup} but federation.rounds is "
            f"{spec.rounds}; the warm-up must leave a round for the method."
        )
    if config.layers.keep == "lossless" and config.model.dtype == "bf16":
        raise UserError(
            "layers.keep=lossless needs model.dtype=fp32: bf16 rounds away the small steps that "
            "curvature is taken from; give a share."
        )
    _check_choices(config)
    settings = deepspeed_config.load(config)
    output = output_folder(config)
    task = sources.load(config)
    if config.model.head != "classifier":
        wording(config, task)
    return Checked(resolved, settings, output, task, partition.partition(task, config))


def _check_choices(config: Config) -> None:
    """Raises UserError for options that contradict each other."""
    kind, layers, server, local = config.adapter.kind, config.layers, config.server, config.local
    if kind == "prompt" and layers.score != "all":
        raise UserError(
            f"layers.score={layers.score} chooses among layers, but adapter.kind=prompt has values "
            "in front of the first layer only; use layers.score=all, or adapter.kind=prefix."
        )
    if server.optimizer != "momentum" and (server.control or server.gradient == "difference"):
        raise UserError(
            f"server.control and server.gradient=difference belong to server.optimizer=momentum, "
            f"not to {server.optimizer}."
        )
    if server.control and local.control:
        raise UserError(
            "local.control and server.control are two ways to use control variates; set one."
        )
    if local.momentum and local.optimizer != "sgd":
        raise UserError(
            f"local.momentum belongs to local.optimizer=sgd; {local.optimizer} has its own."
        )
    if local.moments == "keep" and local.optimizer == "sgd" and not local.momentum:
        raise UserError(
            "local.moments=keep: plain sgd has no moments to keep; set local.momentum, or reset."
        )


def check_ranks(ranks: int, ranks_per_client: int) -> None:
    """Raises UserError unless the ranks make whole slots."""
    if ranks % ranks_per_client:
        raise UserError(
            f"{ranks} MPI ranks do not divide into slots of cluster.ranks_per_client="
            f"{ranks_per_client}; start a multiple of {ranks_per_client} ranks."
        )


def output_folder(config: Config) -> Path:
    """The run directory. Raises UserError if it exists, or could not be made."""
    try:
        path = Path(config.output.format(task=config.task.name, method=config.method))
    except (KeyError, IndexError, ValueError):
        raise UserError(
            f"output is {config.output!r}; only {{task}} and {{method}} may stand in braces."
        ) from None
    if path.exists():
        raise UserError(
            f"The run directory {path} exists already; give another one with output=..., "
            "or remove it."
        )
    parent = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not os.access(parent, os.W_OK) or not parent.is_dir():
        raise UserError(f"The run directory {path} cannot be made: {parent} is not writable.")
    return path
