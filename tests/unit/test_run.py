"""The run directory appears whole, for its owner alone; and trusts no name that a file holds."""

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import peft
import pytest
import torch

from hpcfed.errors import UserError
from hpcfed.rounds.preflight import _check_new, _exists
from hpcfed.settings.resolve import resolve
from hpcfed.state import RunState, ServerState
from hpcfed.storage.adapters import _describe
from hpcfed.storage.commits import Origin
from hpcfed.storage.run import RunDirectory


def create(path):
    state = RunState(torch.zeros(3), ("0", "head"), ServerState(1.0))
    directory = RunDirectory(path)
    directory.create(resolve("lora-fedavg"), {}, {}, {}, state, Origin("", "", ""))
    return directory


def test_only_its_owner_reads_it(tmp_path):
    directory = create(tmp_path / "runs" / "a")
    directory.close()
    assert (tmp_path / "runs" / "a").stat().st_mode & 0o777 == 0o700
    assert RunDirectory(tmp_path / "runs" / "a").reopen().rounds == 0


def test_a_disk_that_is_full_at_the_start_keeps_nothing(tmp_path, monkeypatch):
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for _ in range(2):
        calls.clear()
        with pytest.raises(UserError, match=r"a/\S+ cannot be written; make room on /\S*, or give"):
            create(tmp_path / "a")
        assert not list(tmp_path.iterdir())


@contextlib.contextmanager
def ordinary_user():
    """The rights of somebody who is not root."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_no_right_to_make_a_run_directory(tmp_path):
    """Its parent, or one further up, is closed: a sentence, at the check and later."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    create(tmp_path / "open")  # what it imports may be root's alone
    with ordinary_user():
        for path in (closed / "a", closed / "b" / "a"):
            for attempt in (create, _check_new, _exists):
                with pytest.raises(
                    UserError, match=rf"{path}.* cannot be (written|looked for|made)"
                ):
                    attempt(path)


def test_no_right_to_write_a_run_that_goes_on(tmp_path):
    out = tmp_path / "a"
    create(out).close()
    with tempfile.TemporaryDirectory() as folder:
        moved = Path(folder) / "a"
        shutil.copytree(out, moved)
        for path in (moved.parent, moved, *moved.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        with ordinary_user(), pytest.raises(UserError, match=r"must be readable|cannot be written"):
            RunDirectory(moved).reopen()
        for path in (moved.parent, *(p for p in moved.rglob("*") if p.is_dir()), moved):
            path.chmod(0o755)


def test_an_adapter_has_the_same_bytes_in_every_process(tmp_path):
    """A set's order differs from process to process."""
    names = [f"layer{number}" for number in range(40)]
    config = peft.LoraConfig(target_modules=names, modules_to_save=["b", "a"])
    assert isinstance(config.target_modules, set)
    _describe(tmp_path, config, torch.nn.Linear(1, 1), {}, "model", None)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["target_modules"] == sorted(names)
    assert written["modules_to_save"] == ["a", "b"]
