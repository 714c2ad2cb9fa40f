"""The run directory: the only file that writes files.

config.yaml        the resolved configuration, each value with its source
run.json           model, labels, and for each life of the run: ranks, slots, versions of everything
checkpoint/        the last committed round
lock               held by the job that runs
partition.json     clients x classes
metrics.jsonl      one line per round
selection.json     how the shared layers were chosen
clients/           what clients keep: personal values, difficulties, and a history of their rounds
adapter/           the shared adapter, as a PEFT folder
predictions.json   the predicted class of each test row
summary.json       the result
"""

import importlib.metadata
import json
import math
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from hpcfed.adapters.base import Adapted
from hpcfed.errors import UserError
from hpcfed.settings.resolve import Resolved, describe
from hpcfed.state import RunState
from hpcfed.storage.commits import decode, encode
from hpcfed.storage.files import (
    Lock,
    append_line,
    make_folder,
    sync_file,
    sync_folder,
    write_bytes,
    write_json,
    write_tensors,
)
from hpcfed.storage.paths import (
    ADAPTER,
    CLIENTS,
    CONFIG,
    HISTORY,
    LIVES,
    LOCK,
    MANIFEST,
    METRICS,
    PARTITION,
    PREDICTIONS,
    SELECTION,
    SUMMARY,
)

_PACKAGES = ("hpcfed", "torch", "deepspeed", "transformers", "peft", "mpi4py", "numpy")


class RunDirectory:
    """Writes one run. `create` on rank 0 before training; the rest as the run goes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: Lock | None = None

    def create(
        self,
        resolved: Resolved,
        facts: dict[str, Any],
        here: dict[str, Any],
        partition: dict[str, Any],
        start: RunState,
        job: str = "",
    ) -> None:
        """Write what is known before the first round, and lock the folder.

        It appears under its name when it is complete: there is never half a run directory.
        Raises UserError if another run took the name meanwhile.
        """
        final = self.path
        final.parent.mkdir(parents=True, exist_ok=True)
        # Readable by its owner only, since clients' own values lie in it.
        self.path = Path(tempfile.mkdtemp(".new", f".{final.name}.", final.parent))
        try:
            (self.path / CONFIG).write_text(describe(resolved) + "\n")
            write_json(self.path / PARTITION, partition)
            (self.path / METRICS).touch()
            self.describe_life(facts, here)
            self.commit(start)
            self._lock = Lock(self.path / LOCK, job)
        except Exception:  # a full disk
            shutil.rmtree(self.path, ignore_errors=True)
            raise
        try:
            self.path.rename(final)
        except OSError:
            self._lock.release()
            shutil.rmtree(self.path)
            raise UserError(
                f"The run directory {final} exists already; give another one with output=..., "
                "or remove it."
            ) from None
        self.path = final
        sync_folder(final.parent)

    def reopen(self, job: str = "", patience: float = 0.0) -> RunState:
        """Lock the folder, remove what a life that ended early has left, return the last committed
        state.

        Raises UserError if another job uses it, or what the commit needs is missing.
        """
        self._lock = Lock(self.path / LOCK, job, patience)
        state, tensors, metrics_bytes = self._read()
        self._clean(state, tensors, metrics_bytes)
        return state

    def describe_life(self, facts: dict[str, Any], here: dict[str, Any]) -> None:
        """What runs, and where each life of the run took place, the latest last."""
        file = self.path / LIVES
        lives = json.loads(file.read_text())["lives"] if file.exists() else []
        versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
        versions |= {"python": platform.python_version(), "platform": platform.platform()}
        write_json(file, {**facts, "lives": [*lives, {**here, "versions": versions}]})

    def record(self, record: dict[str, Any]) -> None:
        """Append one round to metrics.jsonl; it counts when the round is committed."""
        append_line(self.path / METRICS, record)

    def commit(self, state: RunState) -> None:
        """Make the state after a round the one that a resumed run goes on from."""
        manifest = self.path / MANIFEST
        make_folder(manifest.parent)
        tensors, content = encode(state)
        file = self.tensors(state)
        write_tensors(file, tensors)
        content["tensors"] = file.name
        content["metrics_bytes"] = (self.path / METRICS).stat().st_size
        write_json(manifest, content)
        self._drop_other_tensors(file)

    def tensors(self, state: RunState) -> Path:
        """The file of what a commit of this state holds besides JSON."""
        return (self.path / MANIFEST).with_name(f"round-{state.rounds:05d}.safetensors")

    def _drop_other_tensors(self, needed: Path) -> None:
        for old in needed.parent.glob("round-*"):
            if old != needed:
                old.unlink()

    def _read(self) -> tuple[RunState, Path, int]:
        """The last committed state, the file of its tensors, and the length of metrics.jsonl.
        Raises UserError if something is not there or not whole."""
        manifest = self.path / MANIFEST
        try:
            content = json.loads(manifest.read_text())
            if Path(content["tensors"]).name != content["tensors"]:
                raise ValueError(f"{content['tensors']!r} is no name of a file")
            tensors = manifest.with_name(content["tensors"])
            state = decode(load_file(tensors), content)
            for file in sorted(self._referred(state)):
                if not file.is_file():
                    raise FileNotFoundError(f"{file} is missing")
            return state, tensors, content["metrics_bytes"]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(
                f"{self.path} cannot be resumed ({type(error).__name__}: {error}); remove it, or "
                "give another run directory with output=..."
            ) from None

    def _referred(self, state: RunState) -> set[Path]:
        """The clients' files that a commit refers to."""
        return {
            self._state(kind, client, round_number)
            for kind, files in state.clients.items()
            for versions in (files.current, files.pinned)
            for client, round_number in versions.items()
        }

    def _clean(self, state: RunState, tensors: Path, metrics_bytes: int) -> None:
        """Remove whatever came after the commit."""
        with (self.path / METRICS).open("r+") as stream:
            stream.truncate(metrics_bytes)
        self._drop_other_tensors(tensors)
        used = self._referred(state)
        for folder in (self.path / CLIENTS).glob("*"):
            for file in folder.iterdir():
                if file.name == HISTORY:
                    lines = file.read_text().splitlines()
                    committed = [w for w in lines if _round(w) <= state.rounds]
                    if committed != lines:
                        write_bytes(file, "".join(f"{w}\n" for w in committed).encode())
                elif file not in used:
                    file.unlink()
        for file in self.path.rglob("*.tmp"):
            file.unlink()

    def save_state(
        self, kind: str, client: int, round_number: int, tensors: dict[str, torch.Tensor]
    ) -> None:
        """What a client keeps after a round."""
        target = self._state(kind, client, round_number)
        self._make_client_folder(client)
        write_tensors(target, tensors)

    def load_state(self, kind: str, client: int, round_number: int) -> dict[str, torch.Tensor]:
        """What a client kept after a round."""
        return load_file(self._state(kind, client, round_number))

    def drop_state(self, kind: str, client: int, round_number: int) -> None:
        """Remove a state that nothing refers to any more."""
        self._state(kind, client, round_number).unlink(missing_ok=True)

    def _state(self, kind: str, client: int, round_number: int) -> Path:
        name = f"{kind}-{round_number:05d}.safetensors"
        return self._client_folder(client) / name

    def _client_folder(self, client: int) -> Path:
        return self.path / CLIENTS / f"{client:06d}"

    def _make_client_folder(self, client: int) -> None:
        make_folder(self.path / CLIENTS)
        make_folder(self._client_folder(client))

    def note(self, client: int, record: dict[str, Any]) -> None:
        """Append a round to a client's own history; by one rank of the slot that ran it."""
        self._make_client_folder(client)
        append_line(self._client_folder(client) / HISTORY, record)

    def save_selection(self, record: dict[str, Any]) -> None:
        """How the shared layers were chosen."""
        write_json(self.path / SELECTION, record)

    def save_adapter(
        self,
        adapted: Adapted,
        values: torch.Tensor,
        fresh: dict[str, torch.Tensor],
        labels: tuple[str, ...],
        source: str,
    ) -> None:
        """The adapter as a folder that `PeftModel.from_pretrained` loads, or the adapter's own
        `load` where PEFT has none of its kind.

        values: (layout.size,) fp32. fresh: frozen weights that the checkpoint lacked; without them
        the adapter would be loaded over other random ones, so they are part of it.
        """
        final = self.path / ADAPTER
        folder = final.with_name("adapter.new")
        for old in (folder, final):  # of a life that ended before the summary
            if old.exists():
                shutil.rmtree(old)
        folder.mkdir()
        tensors = adapted.saved(values)
        tensors |= {adapted.prefix + name: value.float() for name, value in fresh.items()}
        write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
        if isinstance(adapted.description, dict):
            description = {**adapted.description, "base_model_name_or_path": source}
            write_json(folder / "adapter_config.json", description)
        else:
            _describe_to_peft(folder, adapted.description, fresh, source)
        for file in folder.iterdir():
            sync_file(file)
        write_json(folder / "labels.json", list(labels))
        folder.rename(final)
        sync_folder(self.path)

    def save_predictions(self, predictions: dict[str, Any]) -> None:
        """The predicted class of each test row, after the last round."""
        write_json(self.path / PREDICTIONS, predictions, indent=None)

    def save_summary(self, summary: dict[str, Any]) -> None:
        """The result of the run; its presence says that the run is complete."""
        write_json(self.path / SUMMARY, summary)

    def close(self) -> None:
        """Let another job in."""
        if self._lock is not None:
            self._lock.release()


def _describe_to_peft(
    folder: Path, config: Any, fresh: dict[str, torch.Tensor], source: str
) -> None:
    """adapter_config.json, from a peft.PeftConfig."""
    whole = tuple(f"{name}." for name in config.modules_to_save)
    parts = {name.rpartition(".")[0] for name in fresh if not name.startswith(whole)}
    config.modules_to_save = sorted({*config.modules_to_save, *parts})
    config.base_model_name_or_path = source
    config.inference_mode = True
    if isinstance(getattr(config, "target_modules", None), set):
        config.target_modules = sorted(config.target_modules)  # a set's order is not ours
    config.save_pretrained(folder)


def _round(line: str) -> float:
    """The round of a line of history; a line that was cut off comes after every round."""
    try:
        return float(json.loads(line)["round"])
    except (ValueError, KeyError):
        return math.inf
