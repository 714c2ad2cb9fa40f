"""Files that are whole or not there; the lock."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from hpcfed.errors import DiskError, UserError
from hpcfed.storage.files import Lock, append_line, write_bytes, write_json, write_tensors
from tests.support import ROOT

HOLD = """
import sys, time
from pathlib import Path
from hpcfed.storage.files import Lock
lock = Lock(Path(sys.argv[1]), " of Slurm job 7")
print("held", flush=True)
time.sleep(60)
"""


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    write_bytes(file, b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match=rf"disk is full .*: {file} cannot be written; make room"):
        write_bytes(file, b"new")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file], "what was written takes no room"


def test_what_is_not_finite_is_null(tmp_path):
    """JSON has no NaN."""
    file = tmp_path / "lines.jsonl"
    record = {"a": [float("nan"), 1.5, {"b": float("inf")}], "c": (2, float("-inf")), "d": None}
    append_line(file, record)
    write_json(tmp_path / "a.json", record)
    for text in (file.read_text(), (tmp_path / "a.json").read_text()):
        assert json.loads(text, parse_constant=pytest.fail) == {
            "a": [None, 1.5, {"b": None}], "c": [2, None], "d": None,
        }  # fmt: skip


def test_tensors_that_are_views(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    write_tensors(tmp_path / "x.safetensors", {"column": whole[:, 1]})
    assert load_file(tmp_path / "x.safetensors")["column"].tolist() == [1, 5, 9]


def test_append_adds_lines(tmp_path):
    file = tmp_path / "lines.jsonl"
    for number in (1, 2):
        append_line(file, {"round": number})
    assert file.read_text() == '{"round": 1}\n{"round": 2}\n'


def test_the_lock_names_its_holder_and_dies_with_it(tmp_path):
    file = tmp_path / "lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(file)], stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"in use by process {holder.pid} on .* of Slurm job 7"):
        Lock(file, "")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    lock = Lock(file, "", patience=5)
    assert f"process {os.getpid()} on" in file.read_text()
    lock.release()
    assert file.read_text() == "", "nobody holds it"
    Lock(file, "").release()
