"""Wrong configurations: one sentence, exit code 2, before anything starts, nothing written."""

import re
from pathlib import Path

import pytest

from hpcfed.app import cli
from hpcfed.cluster import launcher
from tests.unit.wrong_config import CASES


def tree(folder: Path) -> dict[Path, bytes | None]:
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """In a folder of its own, where no rank is started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launcher, "start", lambda *_: pytest.fail("ranks were started"))


def test_there_are_many_and_each_is_its_own():
    names = [what for what, _, _ in CASES]
    assert len(names) >= 120 and len(set(names)) == len(names)


@pytest.mark.parametrize(("what", "build", "said"), CASES, ids=[case[0] for case in CASES])
def test_refused_in_one_sentence(tmp_path, capsys, what, build, said):
    words = build(tmp_path)
    before = tree(tmp_path)
    assert cli.main(["run", *words, "--ranks", "1"]) == 2
    output, problems = capsys.readouterr()
    lines = problems.splitlines()
    assert len(lines) == 1 and lines[0].startswith("hpcfed: ") and lines[0].endswith("."), problems
    assert re.search(said, lines[0]), lines[0]
    assert len(lines[0]) < 3000 and output == ""
    assert tree(tmp_path) == before
