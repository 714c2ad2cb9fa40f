"""Wrong configurations: one sentence, exit code 2, before anything starts, nothing written."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from hpcfed.app import cli
from hpcfed.cluster import launcher
from tests.unit.wrong_config import CASES, DEEPSPEED, OPTIONS, WITHOUT_EFFECT

NOBODY = 65534


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


# What `hpcfed run` refuses for the launch, the run directory or the data, and `config` does not.
AT_THE_LAUNCH = r"MPI ranks|exists already|cannot be made|run directory|brings none|machine has"


def of_the_configuration():
    for what, build, said in [*OPTIONS, *WITHOUT_EFFECT, *DEEPSPEED]:
        if not re.search(AT_THE_LAUNCH, said) and "threads" not in what and "words" not in what:
            yield pytest.param(build, said, id=what)


@pytest.mark.parametrize(("build", "said"), of_the_configuration())
def test_hpcfed_config_refuses_it_too(tmp_path, capsys, build, said):
    assert cli.main(["config", *build(tmp_path)]) == 2
    output, problems = capsys.readouterr()
    assert re.search(said, problems) and output == ""


@pytest.mark.parametrize(
    ("variable", "words", "said"),
    [
        ("0", (), r"OMP_NUM_THREADS is 0, and this machine has \d+ cores"),
        ("100000", (), r"OMP_NUM_THREADS is 100000, and"),
        ("0", ("cluster.threads=0",), r"cluster\.threads .*at least 1"),
        ("1", ("cluster.threads=100000",), r"cluster\.threads is 100000, and"),
        # What is configured wins over the variable; this goes on to what comes next.
        ("0", ("cluster.threads=1", "federation.clients=2401", "federation.per_round=1"), r"2400"),
        ("4,2", ("federation.clients=2401", "federation.per_round=1"), r"2400 training rows"),
    ],
)
def test_threads(monkeypatch, capsys, variable, words, said):
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert cli.main(["run", "lora-fedavg", *words, "--ranks", "1"]) == 2
    assert re.search(said, capsys.readouterr().err)


@pytest.fixture
def shut():
    """A folder in which a file `mine` and a folder `closed` may not be looked into by this process,
    also if it is root's."""
    folder = Path(tempfile.mkdtemp())  # tmp_path is root's own
    root = os.geteuid() == 0
    folder.chmod(0o755)
    (folder / "mine.yaml").write_text("seed: 1\n")
    (folder / "mine.json").write_text("{}")
    (folder / "closed" / "in").mkdir(parents=True)
    for name in ("mine.yaml", "mine.json", "closed"):
        (folder / name).chmod(0)
    if root:
        os.seteuid(NOBODY)
    yield folder
    if root:
        os.seteuid(0)
    (folder / "closed").chmod(0o700)
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{}/mine.yaml"], r"mine\.yaml cannot be read \(Permission denied\)"),
        (["lora-fedavg", "deepspeed={}/mine.json"], r"mine\.json cannot be read \(Permission de"),
        (["lora-fedavg", "deepspeed={}/closed/ds.json"], r"does not exist"),
        (["{}/closed/my.yaml"], r"neither a YAML file nor a preset"),
        (["lora-fedavg", "output={}/closed/run"], r"cannot be looked for \(Permission denied\)"),
        (["lora-fedavg", "output={}/closed/in/run"], r"cannot be looked for \(Permission denied\)"),
        (["lora-fedavg", "output={}/run/one"], r"cannot be made in .* \(Permission denied\)"),
        (["lora-fedavg", "plugins={}/mine.yaml"], r"cannot be read \(Permission denied\)"),
    ],
)
def test_what_this_user_may_not_read_or_write(shut, capsys, words, said):
    if os.geteuid() not in (0, NOBODY):
        shut.chmod(0o555)
    assert cli.main(["run", *(word.format(shut) for word in words), "--ranks", "1"]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not (shut / "run").exists()


def test_a_refusal_takes_no_torch():
    """So that it comes within a second."""
    code = "import sys; from hpcfed.app.cli import main; code = main(sys.argv[1:]); " \
        "print(code, 'torch' in sys.modules or 'deepspeed' in sys.modules)"  # fmt: skip
    for words in (["demo", "server.lr=5"], ["fibecfed", "deepspeed=none.json"]):
        done = subprocess.run(
            [sys.executable, "-c", code, "run", *words, "--ranks", "2"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout == "2 False\n", done.stderr
