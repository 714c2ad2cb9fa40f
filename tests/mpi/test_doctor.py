"""`hpcfed doctor` in a world of two."""

import pytest
import torch

from tests import architectures
from tests.support import mpiexec
from tests.unit.wrong_models import CASES

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


@pytest.mark.parametrize("shape", [(1, 1), (1, 2)])
def test_a_step_of_a_model(worlds, data, tmp_path, shape):
    """Of models that train, one with a classifier of three classes, which is drawn anew for five
    under ZeRO-3 too; and of one that `hpcfed run` refuses, for the same reason."""
    words = [
        f"cluster.ranks_per_client={shape[1]}", "deepspeed=ds_configs/zero3.json",
        f"data.root={data}", "task.name=few", "task.max_length=32", "cluster.threads=1",
        "federation.clients=4", "federation.per_round=2", f"output={data}", f"--folder={tmp_path}",
    ]  # fmt: skip

    def ask(*more):
        ranks = worlds.call(
            shape, "tests.mpi.cases.runs:command_line", words=["doctor", *words, *more]
        )
        (code,) = {code for code, _, _ in ranks}
        found = [own for own in ranks[0][1].splitlines() if own[6:16] == "trial step"]
        assert len(found) == 1 and not list(tmp_path.glob("*/checkpoint")), ranks
        return code, found[0]

    other = architectures.save("bert", tmp_path / "other")
    for folder in (data / "bert-classifier", other):
        code, said = ask(f"--model={folder}")
        assert code == 0 and said.startswith("ok"), said
    assert f"ZeRO-3 on {shape[1]} rank" in said and "BertForSequenceClassification" in said
    (make,) = (make for what, make, _ in CASES if what == "SqueezeBERT with LoRA")
    code, said = ask(*make(tmp_path / "model"))
    assert code == 1 and said.startswith("MEND") and "no linear layers" in said, said
