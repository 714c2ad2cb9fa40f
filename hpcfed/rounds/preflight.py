"""Everything that can be refused without torch, a model or a GPU: within a second, before anything
starts and before anything is written."""

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcfed import faults, quantized
from hpcfed.data import partition, sources
from hpcfed.data.partition import ClientRows
from hpcfed.data.sources import TaskData
from hpcfed.data.wordings import wording
from hpcfed.errors import UserError
from hpcfed.privacy import options as privacy
from hpcfed.rounds.combinations import check_combinations
from hpcfed.rounds.tracker import check_installed
from hpcfed.settings import deepspeed_config, plugins
from hpcfed.settings.config import Config
from hpcfed.settings.counts import SPECTRAL
from hpcfed.settings.resolve import Resolved, changed, refuse_without_effect
from hpcfed.storage.checks import DamageError, read_bytes, read_object
from hpcfed.storage.paths import CONFIG, LIVES, PARTITION, SUMMARY, home

# What another life of a run may have otherwise: none of it changes a bit of the result but threads,
# which a smaller node may not have.
MAY_CHANGE = (
    "output", "tracker", "cluster.threads", "cluster.meet_seconds", "cluster.timeout_minutes",
    "cluster.grace_seconds",
)  # fmt: skip
ROUNDS = "federation.rounds"  # may grow


@dataclass(frozen=True)
class Checked:
    """A configuration whose launch, DeepSpeed JSON, run directory and data are sound."""

    resolved: Resolved
    settings: dict[str, Any]  # complete DeepSpeed configuration of a client
    output: Path
    task: TaskData
    rows: list[ClientRows]
    begun: bool = False  # the run directory holds a run that is to go on

    @property
    def config(self) -> Config:
        """The configuration itself."""
        return self.resolved.config


def check(resolved: Resolved, ranks: int, resume: bool = False, writes: bool = True) -> Checked:
    """Check and load what a run on `ranks` MPI ranks needs besides its model.

    resume: if the run directory exists, its run goes on; it must be one of this configuration.
    writes: a run directory will be made, and must not be there.
    Raises UserError for the first fault found.
    """
    config = resolved.config
    faults.parse(os.environ.get(faults.VARIABLE, ""))
    check_options(resolved, ranks)
    check_threads(config)
    settings = deepspeed_config.load(config)
    quantized.check(config, settings)
    output = output_folder(config)
    begun = resume and _exists(output)
    if begun:
        _check_unchanged(config, output)
    elif writes:
        _check_new(output)
    task = sources.load(config)
    if config.model.head in ("cloze", "label_words"):  # a plug-in's own says itself what it needs
        wording(config, task)
    rows = partition.partition(task, config)
    privacy.check_clients(config, [len(own.train) for own in rows])
    if begun:
        _check_rows(output, partition.summary(task, rows))
    return Checked(resolved, settings, output, task, rows, begun)


def check_options(resolved: Resolved, ranks: int) -> None:
    """Raises UserError for options that no run on `ranks` MPI ranks can have, or that have no
    effect."""
    config = resolved.config
    check_ranks(ranks, config.cluster.ranks_per_client)
    sources.check_options(config)
    spec = config.federation
    if spec.clients is not None and spec.per_round > spec.clients:
        raise UserError(
            f"federation.per_round is {spec.per_round} but federation.clients is {spec.clients}; "
            "no more can be sampled than there are."
        )
    if spec.min_clients > spec.per_round:
        raise UserError(
            f"federation.min_clients is {spec.min_clients} but federation.per_round is "
            f"{spec.per_round}; no more can come through than are sampled."
        )
    if spec.pooled and (
        spec.clients is None or spec.min_clients > 1 or config.curriculum.pace != "all"
    ):
        raise UserError(
            "federation.pooled makes one client of all, which trains on a share of its rows in "
            "each round: it needs federation.clients as a number, federation.min_clients=1 and "
            "curriculum.pace=all."
        )
    if config.curriculum.warmup >= spec.rounds:
        raise UserError(
            f"curriculum.warmup is {config.curriculum.warmup} but federation.rounds is "
            f"{spec.rounds}; the warm-up must leave a round for the method."
        )
    if SPECTRAL.holds(config) and config.model.dtype == "bf16":
        raise UserError(
            f"layers.keep=lossless by layers.rule={config.layers.rule} needs model.dtype=fp32: "
            "bf16 rounds away the small steps that curvature is taken from; give a share, or "
            "layers.rule=agreement."
        )
    output_folder(config)
    check_installed(config)
    privacy.check(config)
    check_combinations(config)
    refuse_without_effect(resolved)


def check_threads(config: Config) -> None:
    """Raises UserError for more threads than this machine has cores, or none."""
    cores = os.cpu_count() or 1
    given = os.environ.get("OMP_NUM_THREADS", "")
    if config.cluster.threads is not None:
        threads, name = config.cluster.threads, "cluster.threads"
    elif given.isdecimal():
        threads, name = int(given[:10]), "OMP_NUM_THREADS"
    else:
        return
    if not 1 <= threads <= cores:
        raise UserError(
            f"{name} is {threads}, and this machine has {cores} cores; give 1 to {cores} threads."
        )


def is_complete(config: Config) -> bool:
    """Whether the run directory holds a finished run of so many rounds, or one that has come to the
    end of its budget of privacy. Raises UserError if it is another one."""
    output = output_folder(config)
    try:
        summary = read_object(output / SUMMARY)
    except DamageError:
        return False
    private = summary.get("privacy")
    spent = bool(private.get("ended_early")) if isinstance(private, dict) else False
    if "test" not in summary or (summary.get("rounds") != config.federation.rounds and not spent):
        return False
    _check_unchanged(config, output)
    return True


def _check_unchanged(config: Config, output: Path) -> None:
    """Raises UserError unless a run that goes on has the configuration that it began with."""
    if not _exists(output / CONFIG):
        raise UserError(
            f"{output} exists but is no run directory (it has no {CONFIG}), so it cannot be "
            "resumed; give another one with output=..."
        )
    with _whole(output):
        content = read_bytes(output / CONFIG)
        try:
            differing = changed(config, content.decode())
        except (ValueError, UserError):
            raise DamageError(output / CONFIG, "is damaged (it is no configuration)") from None
        began = read_object(output / LIVES).get("plugins") if config.plugins else None
        if config.plugins and not isinstance(began, dict):
            raise DamageError(output / LIVES, "is damaged (it has no digests of plug-ins)")
    changes = {k: v for k, v in differing.items() if k not in MAY_CHANGE}
    if ROUNDS in changes and isinstance(changes[ROUNDS][0], int):
        check_rounds(config, changes.pop(ROUNDS)[0], output)
    if changes:
        key, (then, now) = next(iter(changes.items()))
        more = f", and {len(changes) - 1} more values differ" if len(changes) > 1 else ""
        raise UserError(
            f"The run in {output} began with {key}={then}, not {now}{more}; resume it with the "
            f"configuration it began with ({output / CONFIG}), or give another output=..."
        )
    plugins.check(config.plugins, began or {}, output)


def check_rounds(config: Config, planned: int, output: Path) -> None:
    """Raises UserError unless a run that was to have so many rounds may have as many as are asked
    for now."""
    asked, spec = config.federation.rounds, config.curriculum
    if asked < planned:
        raise UserError(
            f"The run in {output} began with {ROUNDS}={planned}, not {asked}; it may get more "
            f"rounds, not fewer: resume it with {ROUNDS}={planned}, or give another output=..."
        )
    grows = {
        f"curriculum.pace={spec.pace}": spec.pace != "all",
        f"curriculum.cut={spec.cut}": spec.cut != "none",
        f"aggregation.rule={config.aggregation.rule}": config.aggregation.rule
        in ("budget", "slora"),
        f"local.lr_schedule={config.local.lr_schedule}": config.local.lr_schedule != "constant",
    }
    if asked > planned and any(grows.values()):
        grown = next(name for name, holds in grows.items() if holds)
        raise UserError(
            f"The run in {output} began with {ROUNDS}={planned}, not {asked}: with "
            f"{grown} each round depends on how many there are, so it cannot get more; give "
            "another output=..."
        )
    if asked > planned and config.privacy.epsilon is not None and config.privacy.noise is None:
        raise UserError(
            f"The run in {output} began with {ROUNDS}={planned}, not {asked}: its noise was solved "
            "for so many, and they have used up privacy.epsilon; give another output=..."
        )


def _check_rows(output: Path, table: dict[str, Any]) -> None:
    """Raises UserError unless a run that goes on has the data that it began with."""
    with _whole(output):
        began = read_object(output / PARTITION)
    if began != json.loads(json.dumps(table)):
        raise UserError(
            f"The data are not those that the run in {output} began with ({output / PARTITION}); "
            "put them back, or give another output=..."
        )


@contextlib.contextmanager
def _whole(output: Path) -> Iterator[None]:
    """DamageError of a file becomes a UserError."""
    try:
        yield
    except DamageError as damage:
        raise UserError(
            f"{output} cannot be resumed: {damage}; put back a copy that is whole, or give another "
            "run directory with output=..."
        ) from None


def check_ranks(ranks: int, ranks_per_client: int) -> None:
    """Raises UserError unless the ranks make whole slots."""
    if ranks % ranks_per_client:
        raise UserError(
            f"{ranks} MPI ranks do not divide into slots of cluster.ranks_per_client="
            f"{ranks_per_client}; start a multiple of {ranks_per_client} ranks."
        )


def output_folder(config: Config) -> Path:
    """The run directory."""
    known = {
        "{task}": config.task.name.replace("/", "-"),  # of a hub id
        "{method}": Path(config.method).stem,
        "{seed}": str(config.seed),
    }
    parts = re.split(r"(\{[^{}]*\}|[{}])", config.output)
    if any(part[:1] in ("{", "}") and part not in known for part in parts):
        raise UserError(
            f"output is {config.output!r}; only {{task}}, {{method}} and {{seed}} may stand in "
            "braces."
        )
    return home("".join(known.get(part, part) for part in parts))


def _exists(path: Path) -> bool:
    """Raises UserError for a place that this user may not look into."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UserError(
            f"The run directory {path} cannot be looked for ({error.strerror}); give another one "
            "with output=..."
        ) from None
    return True


def _check_new(path: Path) -> None:
    """Raises UserError if the run directory exists, or could not be made."""
    if _exists(path):
        raise UserError(
            f"The run directory {path} exists already; give another one with output=..., "
            "remove it, or let its run go on with --resume."
        )
    parent = next(p for p in path.absolute().parents if _exists(p))
    try:  # what os.access allows may still be refused, as in /proc
        os.rmdir(tempfile.mkdtemp(".new", f".{path.name}.", parent))
    except OSError as error:
        raise UserError(
            f"The run directory {path} cannot be made in {parent} ({error.strerror}); give "
            "another one with output=..."
        ) from None
