"""The run directory appears whole, for its owner alone; and trusts no name that a file holds."""

import json
import os

import pytest
import torch

from hpcfed.errors import UserError
from hpcfed.settings.resolve import resolve
from hpcfed.state import RunState, ServerState
from hpcfed.storage.run import RunDirectory


def create(path):
    state = RunState(torch.zeros(3), ("0", "head"), ServerState(1.0))
    directory = RunDirectory(path)
    directory.create(resolve("lora-fedavg"), {}, {}, {}, state)
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
        with pytest.raises(OSError, match="No space"):
            create(tmp_path / "a")
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../../other.safetensors", "/etc/passwd", "a/b"])
def test_a_manifest_names_files_beside_it(tmp_path, name):
    create(tmp_path / "a").close()
    manifest = tmp_path / "a" / "checkpoint" / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "tensors": name}))
    with pytest.raises(UserError, match="is no name of a file"):
        RunDirectory(tmp_path / "a").reopen()
