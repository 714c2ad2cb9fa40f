"""Files that are whole or not there; the lock."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from hpcfed.errors import UserError
from hpcfed.storage.files import Lock, append_line, write_bytes, write_tensors
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
    with pytest.raises(OSError, match="No space"):
        write_bytes(file, b"new")
    assert file.read_bytes() == b"old"


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
    Lock(file, "").release()
