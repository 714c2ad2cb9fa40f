"""hpcfed from Python: `hpcfed.run` starts a run and reads what it came to."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcfed.app import cli
from hpcfed.cluster.stop import INTERRUPTED
from hpcfed.errors import UserError
from hpcfed.rounds import preflight
from hpcfed.settings.resolve import as_text, leaves, resolve
from hpcfed.storage.checks import DamageError, read_object
from hpcfed.storage.paths import METRICS, SUMMARY


@dataclass(frozen=True)
class Result:
    """A run: its directory, summary.json, and the lines of metrics.jsonl.

    `pandas.json_normalize(result.metrics)` makes a table of them, a row for each round.
    """

    path: Path
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]

    @staticmethod
    def read(path: str | Path) -> "Result":
        """The result in a run directory. Raises UserError if the run is not complete."""
        folder = Path(path)
        try:
            summary = read_object(folder / SUMMARY)
            lines = (folder / METRICS).read_text().splitlines()
            return Result(folder, summary, [json.loads(line) for line in lines])
        except (DamageError, OSError, ValueError) as error:
            raise UserError(f"{folder} holds no complete run ({error}).") from None


def run(
    source: str | Path = "demo",
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    ranks: int | None = None,
    resume: bool = False,
    oversubscribe: bool = False,
) -> Result:
    """Run a federation and return its result.

    source: a preset's name or a YAML file. overrides: {"local.lr": 0.01} (nested mappings too) or
    ["local.lr=0.01"]. ranks: MPI ranks to start on this machine; None: this process is the only
    one, or one of the MPI world that started it, in which every rank calls this. resume: go on with
    the run in the run directory, if there is one; a complete one is only read. oversubscribe: as
    many ranks as that, however few the cores.

    Raises UserError for what the user can mend, and RuntimeError if the run stopped or failed.
    """
    words = _words(overrides)
    config = resolve(str(source), words).config
    folder = preflight.output_folder(config)
    if resume and preflight.is_complete(config):
        return Result.read(folder)
    extra = [f"--ranks={ranks}"] if ranks is not None else []
    extra += ["--resume"] if resume else []
    extra += ["--oversubscribe"] if oversubscribe else []
    faults: list[UserError] = []
    code = cli.main(["run", str(source), *words, *extra], listen=False, faults=faults)
    if faults:
        raise faults[0]
    if code == INTERRUPTED:
        raise RuntimeError(f"the run was asked to stop; go on with resume=True: {folder}")
    if code == 2:
        raise UserError("The run was refused by its ranks; what they said is above.")
    if code:
        raise RuntimeError(f"the run failed with code {code}; what it said is above")
    return Result.read(folder)


def _words(overrides: Mapping[str, Any] | Sequence[str]) -> list[str]:
    if not isinstance(overrides, Mapping):
        return list(overrides)
    return [f"{key}={as_text(_plain(value))}" for key, value in leaves(dict(overrides))]


def _plain(value: Any) -> Any:
    """A path as a text."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value
