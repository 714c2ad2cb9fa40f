"""`hpcfed doctor` in a world of two."""

import torch

from tests.support import mpiexec

CHECKS = (
    "packages", "MPI", "launchers", "devices", "backend", "ZeRO operators", "run folder", "locks",
    "Allreduce",
)  # fmt: skip


def test_a_sound_machine(tmp_path):
    lines = mpiexec(2, "hpcfed", "doctor", f"--folder={tmp_path / 'runs'}").splitlines()
    found = [line for line in lines if line.startswith(("ok  ", "MEND", "NOTE"))]
    assert [line[6:21].strip() for line in found] == list(CHECKS)
    marks = {line[6:21].strip(): line[:4].strip() for line in found}
    devices = marks.pop("devices")
    assert set(marks.values()) == {"ok"}
    if not torch.cuda.is_available():
        assert devices == "NOTE" and "NO GPU IS SEEN (torch " in found[3]
    assert "2 ranks on 1 host" in found[1]
    assert " MB in " in found[-1]
    assert not list((tmp_path / "runs").iterdir()), "it leaves nothing behind"


def test_a_folder_that_will_not_do(tmp_path):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "runs"
    printed = mpiexec(2, "hpcfed", "doctor", f"--folder={folder}", code=1)
    assert "MEND  run folder" in printed and "give a folder that can be written" in printed
