"""Trackers: what is committed of metrics.jsonl, and at last the test scores, for TensorBoard or
wandb to draw. metrics.jsonl is the truth, and a tracker a view of it, on the first rank only.

TensorBoard's files, in the folder `tensorboard` of the run directory, are made anew from the
committed lines by each life of a run. wandb cannot be made anew: all lives are one run of it, by
its id, and how many lines it has got is written down beside its own files; so neither has a point
twice, nor one of a round that was lost.
"""

import importlib.util
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hpcfed.errors import UserError, reason
from hpcfed.settings.config import Config
from hpcfed.storage.files import write_bytes
from hpcfed.storage.paths import METRICS

NAMES = ("tensorboard", "wandb")
TRACKED = "rounds"  # in the folder `wandb`: how many it has got


class Tracker:
    """None."""

    def round(self, record: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl that has just been committed."""

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """The run ends: with its summary.json, or None, to go on another time."""


class TensorBoard(Tracker):
    """Event files, one of each life."""

    def __init__(self, run: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run / "tensorboard"
        if folder.exists():
            shutil.rmtree(folder)
        self._writer: Any = SummaryWriter(str(folder))
        for record in committed(run):
            self.round(record)

    def round(self, record: Mapping[str, Any]) -> None:
        for name, value in scalars(record):
            self._writer.add_scalar(name, value, record["round"])
        self._writer.flush()

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        for name, value in scalars({"test": (summary or {}).get("test") or {}}):
            self._writer.add_scalar(name, value, (summary or {})["rounds"])
        self._writer.close()


class Wandb(Tracker):
    """A run of wandb's, online or, with WANDB_MODE=offline, in the folder `wandb`."""

    def __init__(self, run: Path, identity: str, config: Config) -> None:
        import wandb

        folder = run / "wandb"
        folder.mkdir(exist_ok=True)
        self._done = folder / TRACKED
        self._rounds = int(self._done.read_text()) if self._done.exists() else 0
        self._run: Any = wandb.init(
            project="hpcfed", name=run.name, id=identity, resume="allow", dir=str(run),
            config=config.to_dict(),
        )  # fmt: skip
        for record in committed(run)[self._rounds :]:
            self.round(record)

    def round(self, record: Mapping[str, Any]) -> None:
        self._rounds = record["round"]
        self._run.log(dict(scalars(record)), step=self._rounds)
        write_bytes(self._done, f"{self._rounds}\n".encode())

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        for name, value in scalars({"test": (summary or {}).get("test") or {}}):
            self._run.summary[name] = value
        self._run.finish()


def begin(config: Config, run: Path, identity: str) -> Tracker:
    """The tracker that a configuration names; it has all that was committed before. identity: of
    the run, the same in all its lives.

    Raises UserError if it cannot be begun.
    """
    if config.tracker == "none":
        return Tracker()
    try:
        if config.tracker == "tensorboard":
            return TensorBoard(run)
        return Wandb(run, identity, config)
    except Exception as error:  # wandb, for one, raises what its server says
        raise UserError(
            f"tracker={config.tracker} cannot be begun ({reason(error)}); mend that, set "
            "WANDB_MODE=offline for wandb without its server, or leave the tracker out, and go on "
            "with --resume."
        ) from error


def check_installed(config: Config) -> None:
    """Raises UserError for a tracker whose library is missing."""
    name = config.tracker
    if name != "none" and importlib.util.find_spec(name) is None:
        raise UserError(
            f"tracker={name} needs the package {name}, which is not installed: "
            f"`pip install 'hpcfed[{name}]'`, or leave the tracker out."
        )


def committed(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, which a run that goes on has cut to those that are committed."""
    return [json.loads(line) for line in (run / METRICS).read_text().splitlines()]


def scalars(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a record by name, `bytes/up`, but for those of single clients; of the clients
    that failed, how many."""
    for key, value in record.items():
        if isinstance(value, bool) or key == "round" or key.isdecimal():
            continue
        if key == "failed":
            yield f"{prefix}{key}", float(len(value))
        elif isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            yield f"{prefix}{key}", float(value)
