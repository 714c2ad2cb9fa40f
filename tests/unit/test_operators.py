"""Who may compile DeepSpeed's operators, and what a killed compile leaves behind."""

import contextlib
import os
import subprocess
import sys
import time

import pytest

from hpcfed.cluster import operators

HOLD = """
import sys, time
from pathlib import Path
from hpcfed.cluster import operators
with operators.alone(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def theirs(tmp_path):
    """PyTorch's lock of an operator's folder."""
    folder = tmp_path / "py311_cpu" / "operator"
    folder.mkdir(parents=True)
    return folder / "lock"


@pytest.fixture
def holder(tmp_path):
    """Another process that holds ours."""
    words = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_what_a_killed_compile_left_is_removed(tmp_path, theirs, holder):
    theirs.touch()
    holder.kill()
    holder.wait()
    with operators.alone(tmp_path):
        assert not theirs.exists()
        theirs.touch()
    # This one has ended as it should, so whatever there is now is another program's.
    with operators.alone(tmp_path):
        assert theirs.exists()


def test_one_after_the_other(tmp_path, theirs, holder):
    theirs.touch()
    words = [sys.executable, "-c", HOLD, str(tmp_path)]
    second = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(0.5)
    holder.communicate("\n")
    assert second.communicate("\n")[0] == "held\n" and second.returncode == 0
    assert theirs.exists()


def test_another_programs_lock_is_told_once_it_is_old(tmp_path, theirs, capsys):
    theirs.touch()
    with operators.alone(tmp_path):
        assert not capsys.readouterr().err
    old = time.time() - 3600
    os.utime(theirs, (old, old))
    with operators.alone(tmp_path):
        assert f"waiting for {theirs}" in capsys.readouterr().err and theirs.exists()


def test_a_compile_that_fails_leaves_the_next_one_free(tmp_path, theirs):
    with contextlib.suppress(RuntimeError), operators.alone(tmp_path):
        theirs.touch()
        raise RuntimeError
    with operators.alone(tmp_path):
        assert not theirs.exists()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with operators.alone(tmp_path / "file" / "below"):
        pass
