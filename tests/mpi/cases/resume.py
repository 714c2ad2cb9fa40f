"""Cases: a run that ends at any instant goes on from its last commit and ends with the same bits.

All in one process: an exception strikes where a signal might, and a file that is being written is
torn; what the exception leaves on disk is what a killed process would.
"""

import contextlib
import errno
import gc
import hashlib
import io
import json
import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from safetensors.torch import load_file

from hpcfed.app import cli, run
from hpcfed.cluster.stop import SIGNALS
from hpcfed.cluster.topology import Topology
from hpcfed.rounds.federation import Federation
from hpcfed.rounds.progress import Progress
from hpcfed.storage.commits import decode, encode, unseal
from hpcfed.storage.paths import MANIFEST, METRICS, PREVIOUS, tensors_of
from tests.mpi.cases.runs import build, clear
from tests.mpi.interrupt import EVENTS, Still, arm
from tests.same import assert_same
from tests.support import line


class Struck(BaseException):
    """The end of a life."""


class Instants:
    """Everything in a run that could be its last: patches what touches the disk, and the events.

    strikes(kind): asked at each instant; True ends the life there.
    """

    def __init__(
        self,
        folder: Path,
        strikes: Callable[[str], bool],
        notice: Callable[[str, Path, Path], None] = lambda what, path, target: None,
    ) -> None:
        """notice: told what has been done to which file, and where it is now."""
        self._folder, self._strikes, self._notice = folder, strikes, notice
        self._stack = ExitStack()

    def __enter__(self) -> "Instants":
        fsync = os.fsync

        def syncing(descriptor: int) -> None:
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            if path.is_file() and self._here(path) and self._strikes(f"write {kind(path)}"):
                with path.open("r+b") as stream:
                    stream.truncate(self._torn(path))
                raise Struck
            fsync(descriptor)
            self._notice("sync", path, path)

        self._stack.enter_context(patch.object(os, "fsync", syncing))
        for name in ("replace", "rename", "unlink"):
            self._stack.enter_context(patch.object(Path, name, self._moving(name)))
        for name, (holder, attribute) in EVENTS.items():
            event = self._event(name, getattr(holder, attribute))
            self._stack.enter_context(patch.object(holder, attribute, event))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _here(self, path: Path) -> bool:
        return self._folder.parent in path.parents

    def _torn(self, path: Path) -> int:
        """In the middle of what is new: of the file, or of its last line."""
        content = path.read_bytes()
        if path.suffix == ".jsonl":
            start = content[:-1].rfind(b"\n") + 1
            return start + (len(content) - start) // 2
        return len(content) // 2

    def _moving(self, name: str) -> Any:
        original = getattr(Path, name)

        def moving(path: Path, *rest: Any, **options: Any) -> Any:
            target = Path(rest[0]) if rest else path
            inside = self._here(path.absolute())
            # Before it gets its name a whole file is worth as much as the torn one.
            if inside and name != "replace" and self._strikes(f"before {name} {kind(target)}"):
                raise Struck
            result = original(path, *rest, **options)
            self._notice(name, path.absolute(), target.absolute())
            if inside and self._strikes(f"after {name} {kind(target)}"):
                raise Struck
            return result

        return moving

    def _event(self, name: str, original: Any) -> Any:
        def event(*arguments: Any, **options: Any) -> Any:
            if self._strikes(name):
                raise Struck
            return original(*arguments, **options)

        return event


def kind(path: Path) -> str:
    """A file's name, without client, round and process."""
    return re.sub(r"\d+", "N", path.name)


def life(
    topology: Topology, preset: str, words: list[str], instants: Instants, resume: bool = True,
    begun: Callable[[Federation], None] = lambda federation: None,
) -> bool:  # fmt: skip
    """One life of a run; whether it came to its end."""
    federation = None
    try:
        with instants:
            federation = build(topology, preset, words, resume)
            begun(federation)
            federation.run(Progress(speaks=False))
        return True
    except Struck:
        if federation is not None:
            federation.setup.directory.close()
            federation.setup.engine.close()
        return False
    finally:
        federation = None
        gc.collect()  # the lock goes with what held it


def state(federation: Federation) -> str:
    """A digest of all that a commit holds, but for seconds, and of what clients keep."""
    tensors, fields = encode(federation.state)
    fields.pop("seconds")
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for kept, states in federation.client_states.items():
        for client in states.files.current:
            loaded = states.load(client)
            assert loaded is not None
            tensors |= {f"{kept} {client} {name}": value for name, value in loaded.items()}
    for name, value in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def whole(
    topology: Topology, preset: str, words: list[str], out: Path,
    notice: Callable[[str, Path, Path], None] = lambda what, path, target: None,
) -> dict[int, str]:  # fmt: skip
    """An undisturbed run: what was committed, by rounds."""
    clear(topology, out)
    committed: dict[int, str] = {}

    def begun(federation: Federation) -> None:
        committed[0] = state(federation)
        commit = federation.commit

        def noting(record: dict[str, Any]) -> None:
            commit(record)
            committed[federation.state.rounds] = state(federation)

        federation.commit = noting  # type: ignore[method-assign]

    instants = Instants(out, lambda name: False, notice)
    assert life(topology, preset, [*words, f"output={out}"], instants, False, begun)
    return committed


def check(
    topology: Topology, preset: str, words: list[str], folder: Path, times: int,
    only: list[str] | None = None,
) -> dict[str, int]:  # fmt: skip
    """A run that is struck at each kind of instant, in up to `times` different rounds: after each
    strike it is where the undisturbed run was after as many rounds, and in the end it has the same
    bits. Returns how often each kind of instant has struck."""
    committed = whole(topology, preset, words, folder / "whole")
    out = folder / "struck"
    clear(topology, out)
    struck: Counter[str] = Counter()
    rounds: dict[str, int] = {}  # in which each kind struck last
    last = ""  # in this life
    now = 0

    def strikes(name: str) -> bool:
        nonlocal last
        if last or struck[name] >= times or rounds.get(name) == now or (only and name not in only):
            return False
        last = name
        struck[name] += 1
        rounds[name] = now
        return True

    def begun(federation: Federation) -> None:
        nonlocal now
        now = federation.state.rounds
        assert state(federation) == committed[now], (
            f"after {now} rounds and a strike at {previous!r}: not what was committed"
        )

    ended = False
    while not ended:
        previous, last = last, ""
        ended = life(
            topology, preset, [*words, f"output={out}"], Instants(out, strikes), True, begun
        )
        assert ended == (not last), f"{last!r} was swallowed"
        for stray in folder.glob(".struck.*.new"):  # a run directory that never came to be
            shutil.rmtree(stray)
    assert_same(folder / "whole", out)
    return dict(struck)


def command(
    topology: Topology, words: list[str], strike: tuple[str, int, int, str] | None
) -> tuple[int, str]:
    """`hpcfed WORDS` in this world, which a real signal strikes at (event, count, rank, name); its
    exit code on this rank, and what it printed."""
    printed = io.StringIO()
    with ExitStack() as stack:
        for number in SIGNALS:
            stack.callback(signal.signal, number, signal.getsignal(number))
        stack.enter_context(contextlib.redirect_stdout(printed))
        stack.enter_context(contextlib.redirect_stderr(printed))
        stack.enter_context(patch.object(run, "Stop", Still))
        if strike is not None:
            stack.enter_context(patch.object(*arm(*strike)))
        code = cli.main(line(words))
    gc.collect()
    return code, printed.getvalue()


def full(topology: Topology, words: list[str], file: str, count: int) -> tuple[int, str]:
    """`hpcfed WORDS` on a disk that is full from the `count`-th write of this kind of file on."""
    fsync, left = os.fsync, [count]

    def syncing(descriptor: int) -> None:
        name = kind(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        left[0] -= left[0] > 0 and name.removesuffix(".tmp") == file
        if left[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with patch.object(os, "fsync", syncing):
        return command(topology, words, None)


def check_order(topology: Topology, preset: str, words: list[str], folder: Path) -> int:
    """What must outlive a loss of power is on disk in time. Returns how many commits were seen."""
    order = Order()
    whole(topology, preset, words, folder / "ordered", order.notice)
    return order.commits


class Order:
    """A file's content is forced to disk before it gets its name; all that a manifest refers to,
    and the manifest before it, contents and names, before the manifest is there; and nothing is
    removed that the last two manifests on disk refer to. The adapter is on disk before the summary
    says that the run is complete."""

    def __init__(self) -> None:
        self.commits = 0
        self._contents: set[Path] = set()  # files whose content is on disk
        self._names: set[Path] = set()  # files and folders whose name is
        self._needed: set[Path] = set()
        self._last = ("", Path())

    def notice(self, what: str, path: Path, target: Path) -> None:
        """Something has been done."""
        if what == "sync" and path.is_dir():
            self._names |= set(path.iterdir())
        elif what == "sync":
            self._contents.add(path)
        elif what == "replace":
            assert self._last == ("sync", path), f"{target} got its name before it was on disk"
            self._contents.add(target)
            self._names.discard(target)
            if target.name == Path(MANIFEST).name:
                self._committed(target)
            if target.name == "summary.json":
                self._there(list((target.parent / "adapter").iterdir()), target.parent)
        elif what == "rename" and target.is_dir():
            for known in (self._contents, self._names):
                moved = {target / own.relative_to(path) for own in known if path in own.parents}
                known |= moved
        elif what == "unlink":
            assert path not in self._needed, f"{path} is removed, and a commit needs it"
        self._last = (what, path)

    def _committed(self, manifest: Path) -> None:
        run, previous = manifest.parent.parent, manifest.with_name(Path(PREVIOUS).name)
        rounds, files = self._reached(manifest, run)
        if rounds:  # the first commit is part of a folder that has no name yet
            before, others = self._reached(previous, run)
            assert before == rounds - 1
            files += [previous, *others]
            self._there(files, run)
            self.commits += 1
        self._needed = set(files)

    def _reached(self, manifest: Path, run: Path) -> tuple[int, list[Path]]:
        """The rounds of a commit, and the files that it refers to."""
        content = unseal(manifest.read_bytes())
        files = [run / name for name in (*content.files, METRICS)]
        tensors = load_file(run / tensors_of(content.rounds))
        for kept, own in decode(tensors, content).clients.items():
            for client, number in (*own.current.items(), *own.pinned.items()):
                files.append(run / "clients" / f"{client:06d}" / f"{kept}-{number:05d}.safetensors")
        return content.rounds, files

    def _there(self, files: list[Path], run: Path) -> None:
        for file in files:
            assert file in self._contents, f"the content of {file} is not on disk"
            while file != run:
                assert file in self._names, f"the name of {file} is not on disk"
                file = file.parent
