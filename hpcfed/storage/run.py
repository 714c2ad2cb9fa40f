"""The run directory: the only file that writes files.

config.yaml        the resolved configuration, each value with its source
run.json           model, labels, and for each life of the run: ranks, slots, versions of everything
checkpoint/        the last committed round, and the one before
lock               held by the job that runs
partition.json     clients x classes
metrics.jsonl      one line per round
selection.json     how the shared layers were chosen
clients/           what clients keep: personal values, difficulties, and a history of their rounds
adapter/           the shared adapter, as a PEFT folder
predictions.json   the predicted class of each test row
summary.json       the result
"""

import contextlib
import hashlib
import importlib.metadata
import platform
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from hpcfed.adapters.base import Adapted
from hpcfed.adapters.layout import AdapterLayout
from hpcfed.errors import DiskError, UserError
from hpcfed.settings.resolve import Resolved, describe
from hpcfed.state import RunState
from hpcfed.storage import secret
from hpcfed.storage.adapters import write_adapter
from hpcfed.storage.checks import DamageError, check_kinds, digest, read_bytes, read_object
from hpcfed.storage.clients import ClientFolders
from hpcfed.storage.commits import (
    Committed,
    FormatError,
    Origin,
    decode,
    encode,
    seal,
    unseal,
)
from hpcfed.storage.files import (
    Lock,
    append_line,
    as_json,
    make_folder,
    sync_folder,
    write_bytes,
    write_json,
    write_tensors,
    writing,
)
from hpcfed.storage.paths import (
    ADAPTER,
    CHECKPOINT,
    CLIENTS,
    CONFIG,
    FILES,
    LIVES,
    LOCK,
    MANIFEST,
    METRICS,
    PARTITION,
    PREDICTIONS,
    PREVIOUS,
    SELECTION,
    SUMMARY,
    tensors_of,
)

_PACKAGES = ("hpcfed", "torch", "deepspeed", "transformers", "peft", "mpi4py", "numpy")
_TENSORS = re.compile(r"round-(\d{5,})\.safetensors(\.tmp)?")


class RunDirectory:
    """Writes one run. `create` on rank 0 before training, or `reopen` and then `go_on`; the rest as
    the run goes. clients: what clients keep, in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.clients = ClientFolders(path / CLIENTS)
        self.damage: DamageError | None = None  # why the commit before the last one is used
        self.began = Origin("", "", "")
        self.planned = 0  # rounds
        self._lock: Lock | None = None
        self._committed = b""  # the last manifest
        self._state: RunState | None = None  # that was read
        self._digests: dict[str, str] = {}  # of files that the manifest names, without its tensors
        self._metrics, self._metrics_bytes = hashlib.sha256(), 0

    def create(
        self,
        resolved: Resolved,
        facts: dict[str, Any],
        here: dict[str, Any],
        partition: dict[str, Any],
        start: RunState,
        began: Origin,
        job: str = "",
        key: bytes | None = None,
    ) -> None:
        """Write what is known before the first round, and lock the folder. key: a secret one, which
        lies beside the folder.

        It appears under its name when it is complete: there is never half a run directory.
        Raises UserError if it cannot be written, or another run took the name meanwhile.
        """
        final = self.path
        self.began, self.planned = began, resolved.config.federation.rounds
        self.clients.run = secrets.token_hex(8)
        mend = "or give another run directory with output=..."
        try:
            with writing(final):
                final.parent.mkdir(parents=True, exist_ok=True)
                # Readable by its owner only, since clients' own values lie in it.
                self.path = Path(tempfile.mkdtemp(".new", f".{final.name}.", final.parent))
        except DiskError as error:
            raise error.then(mend) from None
        try:
            with writing(final):
                write_bytes(self.path / CONFIG, (describe(resolved) + "\n").encode())
                self._record(PARTITION, partition)
                (self.path / METRICS).touch()
                self._describe_life(facts, here)
                self.commit(start)
                if key is not None:
                    secret.write(secret.place(final, self.clients.run), key)
                self._lock = Lock(self.path / LOCK, job)
                if final.exists():
                    raise FileExistsError
                self.path.rename(final)
        except Exception as error:
            self.close()
            made, self.path = self.path, final
            shutil.rmtree(made, ignore_errors=True)
            if key is not None:
                secret.place(final, self.clients.run).unlink(missing_ok=True)
            if final.exists():
                raise UserError(
                    f"The run directory {final} exists already; give another one with output=..., "
                    "or remove it."
                ) from None
            if isinstance(error, DiskError):
                fact = error.fact.replace(str(made), str(final))
                raise DiskError(fact).then(mend) from None
            raise
        self.path = final
        sync_folder(final.parent)

    def reopen(self, job: str = "", patience: float = 0.0) -> RunState:
        """Lock the folder, check all that is in it, return the last committed state that is whole.
        Nothing is changed before `go_on`.

        Raises UserError if another job uses it, or what the commit needs is missing or damaged.
        """
        try:
            check_kinds(self.path)
            self._lock = Lock(self.path / LOCK, job, patience)
            if not isinstance(read_object(self.path / LIVES).get("lives"), list):
                raise DamageError(self.path / LIVES, "is damaged (it lists no lives)")
            self._state = self._last_whole()
        except (DamageError, OSError) as error:
            what = str(error)
        except DiskError as error:
            raise error.then("and go on with --resume: what is committed is whole") from None
        else:
            return self._state
        raise UserError(
            f"{self.path} cannot be resumed: {what}; put back a copy that is whole, or give "
            "another run directory with output=..."
        )

    def read_key(self) -> bytes:
        """After `reopen`: the secret key that `create` was given. Raises UserError."""
        return secret.read(secret.place(self.path, self.clients.run), self.path)

    def look(self) -> RunState:
        """Check all that a commit refers to, return the last committed state that is whole; nothing
        is locked or changed.

        Raises UserError for a folder that holds none.
        """
        try:
            check_kinds(self.path, writable=False)
            self._state = self._last_whole()
            return self._state
        except (DamageError, OSError) as error:
            raise UserError(
                f"{self.path} cannot be read as a run: {error}; give the run directory of a run "
                "that has begun, whole."
            ) from None

    def check_layout(self, layout: AdapterLayout) -> None:
        """After `reopen` or `look`: raises UserError if the state is not one of this adapter."""
        assert self._state is not None
        odd = set(self._state.chosen) - set(layout.blocks)
        if odd or len(self._state.values) != layout.size:
            raise UserError(
                f"{self.path} cannot be resumed: {self.path / MANIFEST} is damaged (it is of "
                "another adapter); give another run directory with output=..."
            )

    def go_on(self, resolved: Resolved, facts: dict[str, Any], here: dict[str, Any]) -> None:
        """After `reopen`, and once everything else is known to be sound: remove what a life that
        ended early has left, and note the new one."""
        assert self._state is not None
        before, self.planned = self.planned, resolved.config.federation.rounds
        try:
            with writing(self.path):
                if self.damage is not None:
                    write_bytes(self.path / MANIFEST, self._committed)
                # Of a run that was complete, and gets more rounds; or damaged.
                (self.path / SUMMARY).unlink(missing_ok=True)
                with (self.path / METRICS).open("r+") as stream:
                    stream.truncate(self._metrics_bytes)
                self._drop_tensors(self._state.rounds)
                self.clients.clean(self._state.clients, self._state.rounds)
                for name in (*FILES, MANIFEST, PREVIOUS):
                    (self.path / f"{name}.tmp").unlink(missing_ok=True)
                if self.planned != before:
                    write_bytes(self.path / CONFIG, (describe(resolved) + "\n").encode())
                self._describe_life(facts, here)
        except DiskError as error:
            raise error.then("and go on with --resume: what is committed is whole") from None

    def _describe_life(self, facts: dict[str, Any], here: dict[str, Any]) -> None:
        """What runs, and where each life of the run took place, the latest last."""
        file = self.path / LIVES
        lives = read_object(file)["lives"] if file.exists() else []
        versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
        versions |= {"python": platform.python_version(), "platform": platform.platform()}
        write_json(file, {**facts, "lives": [*lives, {**here, "versions": versions}]})

    def record(self, record: dict[str, Any]) -> None:
        """Append one round to metrics.jsonl; it counts when the round is committed."""
        line = append_line(self.path / METRICS, record)
        self._metrics.update(line)
        self._metrics_bytes += len(line)

    def commit(self, state: RunState) -> None:
        """Make the state after a round the one that a resumed run goes on from."""
        make_folder(self.path / CHECKPOINT)
        tensors, fields = encode(state)
        name = tensors_of(state.rounds)
        files = {name: digest(write_tensors(self.path / name, tensors)), **self._digests}
        if self._committed:
            write_bytes(self.path / PREVIOUS, self._committed)
        self._committed = seal(
            {
                **fields,
                "run": self.clients.run,
                "began": asdict(self.began),
                "planned": self.planned,
                "metrics": asdict(Committed(self._metrics_bytes, self._metrics.hexdigest())),
                "files": files,
            }
        )
        write_bytes(self.path / MANIFEST, self._committed)
        self._drop_tensors(state.rounds)

    def _drop_tensors(self, rounds: int) -> None:
        """Those of other commits than this one and the one before."""
        for file in list((self.path / CHECKPOINT).iterdir()):
            match = _TENSORS.fullmatch(file.name)
            if match and (match[2] or int(match[1]) not in (rounds, rounds - 1)):
                file.unlink()

    def _last_whole(self) -> RunState:
        """The state of the last commit or, where that is damaged, of the one before.

        Raises DamageError, of the last one, if neither is whole.
        """
        for name in (MANIFEST, PREVIOUS):
            try:
                return self._read(self.path / name)
            except DamageError as damage:
                self.damage = self.damage or damage
        assert self.damage is not None
        raise self.damage

    def _read(self, file: Path) -> RunState:
        """The state of a commit, when all that it refers to is whole. Raises DamageError."""
        content = read_bytes(file)
        with _damage(file, "is damaged ({})"):
            manifest = unseal(content)
        parts = {name: read_bytes(self.path / name) for name in manifest.files}
        metrics = read_bytes(self.path / METRICS)
        if len(metrics) < manifest.metrics.bytes:
            raise DamageError(self.path / METRICS, "is shorter than what was committed of it")
        metrics = metrics[: manifest.metrics.bytes]
        parts[METRICS] = metrics
        for name, digested in (*manifest.files.items(), (METRICS, manifest.metrics.sha256)):
            if digest(parts[name]) != digested:
                raise DamageError(
                    self.path / name, "is not what was committed (its checksum differs)"
                )
        name = tensors_of(manifest.rounds)
        with _damage(self.path / name, "{}"):
            state = decode(load(parts[name]), manifest)
        self.clients.run = manifest.run
        self.clients.check(state.clients)
        self.began, self.planned = manifest.began, manifest.planned
        self._committed = content
        self._digests = {key: value for key, value in manifest.files.items() if key != name}
        self._metrics, self._metrics_bytes = hashlib.sha256(metrics), len(metrics)
        return state

    def _record(self, name: str, content: dict[str, Any]) -> None:
        """A file of JSON that the next manifest names."""
        written = as_json(content, indent=1)
        write_bytes(self.path / name, written)
        self._digests[name] = digest(written)

    def save_selection(self, record: dict[str, Any]) -> None:
        """How the shared layers were chosen."""
        self._record(SELECTION, record)

    def save_adapter(
        self,
        adapted: Adapted,
        values: torch.Tensor,
        fresh: dict[str, torch.Tensor],
        labels: tuple[str, ...],
        source: str,
        model_class: str = "AutoModelForSequenceClassification",
    ) -> None:
        """The adapter of the last round, see `write_adapter`."""
        final = self.path / ADAPTER
        folder = final.with_name("adapter.new")
        with writing(final):
            for old in (folder, final):  # of a life that ended before the summary
                if old.exists():
                    shutil.rmtree(old)
            folder.mkdir()
            write_adapter(folder, adapted, values, fresh, labels, source, model_class)
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


@contextlib.contextmanager
def _damage(file: Path, text: str) -> Iterator[None]:
    """What is wrong with a file's content, as DamageError; another hpcfed's, as UserError."""
    try:
        yield
    except FormatError as error:
        raise UserError(
            f"{file.parent.parent} cannot be resumed: {file} is of another hpcfed ({error}); go "
            "on with that one, or give another run directory with output=..."
        ) from None
    except SafetensorError as error:
        raise DamageError(file, f"is damaged ({error})") from None
    except ValueError as error:
        raise DamageError(file, text.format(error)) from None
