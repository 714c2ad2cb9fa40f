"""Launches that cannot be get one sentence, exit code 2, and leave nothing."""

import os
import re
from pathlib import Path

import pytest

from hpcfed.app import cli
from hpcfed.cluster import launcher
from tests.support import ROOT
from tests.unit.fake_slurm import FakeSlurm
from tests.unit.wrong_launches import CASES, FILES

_VARIABLE = re.compile(r"([A-Z_]+)=(.*)")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder with FILES, where commands are given."""
    folder = tmp_path / "here"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    monkeypatch.chdir(folder)
    return folder


def content(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(("words", "sentence"), [case[1:] for case in CASES],
                         ids=[case[0] for case in CASES])  # fmt: skip
def test_it_is_refused(place, tmp_path, monkeypatch, capsys, words, sentence):
    given = [_VARIABLE.fullmatch(word) for word in words]
    variables = {found[1]: found[2] for found in given if found}
    program, *rest = words[len(variables) :]
    before = content(place)
    if program == "sbatch":
        script, *own = (word.replace("{clone}", str(ROOT)) for word in rest)
        slurm = FakeSlurm(tmp_path / "slurm")
        code, said = slurm.run(
            script, *own, cwd=place, **{"SCRIPTS": str(ROOT / "slurm"), **variables}
        )
        assert not any("run" in call for call in slurm.calls("srun")), "no step is started"
    else:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(launcher, "start", lambda *_: pytest.fail("ranks are started"))
        code, said = cli.main(rest), capsys.readouterr().err
        assert said.startswith("hpcfed: ") and said.count("\n") == 1
    assert code == 2, said
    assert re.search(sentence, said), said
    assert "Traceback" not in said
    assert content(place) == before and not (place / "runs").exists()


@pytest.mark.parametrize("command", ["run", "doctor"])
def test_many_ranks_if_that_is_meant(monkeypatch, command):
    started = []

    def start(ranks, words, grace=0.0):
        started.append((ranks, words))
        return 0

    monkeypatch.setattr(launcher, "start", start)
    most = launcher.RANKS_PER_CORE * len(os.sched_getaffinity(0))
    most -= most % 2  # whole clients of the demo
    source = ["demo", "output=nowhere/x"] if command == "run" else []
    for words in (["--ranks", str(most)], ["--ranks", str(10 * most), "--oversubscribe"]):
        assert cli.main([command, *source, *words]) == 0
    assert [ranks for ranks, _ in started] == [most, 10 * most]
    assert not any("--oversubscribe" in words for _, words in started)
