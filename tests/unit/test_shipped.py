"""What travels with the package: from another folder, as copies, and the list in pyproject.toml."""

import subprocess
import sys
import tomllib

import pytest
import yaml

from hpcfed.app import scripts
from hpcfed.app.cli import main
from hpcfed.app.sweep import Sweep
from hpcfed.errors import UserError
from hpcfed.settings import deepspeed_config, shipped
from tests.support import ROOT
from tests.unit.fake_slurm import FakeSlurm


def test_pyproject_names_every_package():
    """A package that is missing there is missing in the wheel."""
    tree = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {
        ".".join(file.parent.relative_to(ROOT).parts)
        for file in (ROOT / "hpcfed").rglob("__init__.py")
    }
    assert set(tree["packages"]) == found | set(tree["package-dir"])
    assert {name.rpartition(".")[2]: place for name, place in tree["package-dir"].items()} == {
        "ds_configs": "ds_configs", "launch": "launch", "slurm": "slurm",
    }  # fmt: skip


def test_a_shipped_json_is_found_from_any_folder(tmp_path, monkeypatch):
    """One of the same name where the process runs wins."""
    monkeypatch.chdir(tmp_path)
    own = deepspeed_config.locate("ds_configs/zero2.json")
    assert own == shipped.folder("ds_configs") / "zero2.json" and own.is_file()
    for name in ("zero2.json", "x/ds_configs/zero2.json", "pyproject.toml", "../ds_configs"):
        with pytest.raises(UserError, match=r"does not exist; there are: ds_configs/offload\.json"):
            deepspeed_config.locate(name)
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs" / "zero2.json").write_text("{}")
    assert deepspeed_config.locate("ds_configs/zero2.json").read_text() == "{}"


def test_the_copies_work_from_any_folder(tmp_path, monkeypatch):
    """A folder with a blank and a quote in its name; jobs submitted from elsewhere."""
    place, elsewhere = tmp_path / "my 'own' scripts", tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["scripts", place.name]) == 0
    names = {p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file()}
    of_clone = {
        p.relative_to(ROOT).as_posix()
        for name in ("slurm", "launch", "ds_configs")
        for p in (ROOT / name).rglob("*")
        if p.is_file() and p.suffix in (".sh", ".py", ".yaml", ".json")
    }
    assert names == of_clone and len(names) > 12
    slurm = FakeSlurm(tmp_path / "slurm")
    script = str(place / "slurm" / "fibecfed.sh")
    code, printed = slurm.run(script, cwd=elsewhere, PYTHON="", DEVICE="cpu")
    assert code == 0, printed
    assert sys.executable in slurm.step()
    monkeypatch.chdir(elsewhere)
    sweep = Sweep.load(place / "launch" / "experiments" / "llama-7b.yaml")
    for run in sweep.runs:
        own = deepspeed_config.locate(sweep.resolved(run).config.deepspeed)
        assert own == place / "ds_configs" / "zero3.json"


def test_the_copies_are_the_files_but_for_places(tmp_path):
    """No line is lost, and few differ."""
    for file in scripts.write(tmp_path / "x"):
        ours, copy = (ROOT / file).read_text(), (tmp_path / "x" / file).read_text()
        pairs = zip(ours.splitlines(), copy.splitlines(), strict=True)
        differ = [line for line, other in pairs if line != other]
        assert len(differ) == (2 if file.match("slurm/*.sh") and file.name != "job.sh" else
                               file.name == "llama-7b.yaml"), differ  # fmt: skip


@pytest.mark.parametrize("file", sorted((ROOT / "launch" / "experiments").glob("*.yaml")))
def test_the_experiments_name_shipped_json(file):
    name = yaml.safe_load(file.read_text()).get("overrides", {}).get("deepspeed")
    assert name is None or (ROOT / name).is_file()


@pytest.mark.parametrize("program", ["launch/sweep.py", "launch/train.py"])
def test_thin_calls(program, tmp_path):
    """They take what `hpcfed sweep` and `hpcfed run` take."""
    words = ["line", "0", "nowhere.yaml"] if "sweep" in program else ["nowhere.yaml"]
    done = subprocess.run(
        [sys.executable, str(ROOT / program), *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 and "hpcfed: " in done.stderr and "nowhere.yaml" in done.stderr
