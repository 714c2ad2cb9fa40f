"""The wheel, installed in an empty place, holds what runs and sweeps need."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml

from tests.mpi.variants import COMMON
from tests.support import ROOT

SOURCES = ("hpcfed", "ds_configs", "launch", "slurm", "pyproject.toml", "README.md", "LICENSE")
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")


def call(*words, **more):
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """installed(*words, cwd=...): `hpcfed *words` of the wheel; third parties are this python's."""
    place = tmp_path_factory.mktemp("wheel")
    tree, site = place / "tree", place / "site"
    tree.mkdir()
    for name in SOURCES:  # a copy, since a build writes beside them
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tree)
    call(*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", place, tree)
    (wheel,) = place.glob("hpcfed-*.whl")
    call(*PIP, "install", "--no-deps", "--target", site, wheel)
    shutil.rmtree(tree)

    def hpcfed(*words, cwd):
        environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
        where = "import hpcfed; print(hpcfed.__file__)"
        found = call(sys.executable, "-c", where, cwd=cwd, env=environment)
        assert found.startswith(str(site))
        return call(sys.executable, "-m", "hpcfed", *words, cwd=cwd, env=environment)

    return hpcfed


@pytest.mark.long
def test_runs_and_sweeps(installed, data, tmp_path):
    """`hpcfed run demo`, made small, and a sweep: with the JSON of the package, and scripts."""
    values = dict(own.split("=", 1) for own in COMMON if own != "model.dropout=0")
    values |= {"model.name": f"{data}/bert-classifier", "data.root": str(data)}
    values |= {"method": "lora-fedavg", "federation.rounds": "1", "evaluation.every": "1"}
    small = [f"{key}={value}" for key, value in values.items()]
    printed = installed("run", "demo", *small, "--ranks", "2", cwd=tmp_path)
    assert "2 ranks = 1 slot x 2 ZeRO ranks" in printed
    run = json.loads((tmp_path / "runs" / "demo" / "run.json").read_text())
    assert run["deepspeed"]["zero_optimization"]["stage"] == 2, "ds_configs/zero2.json"
    overrides = {key: yaml.safe_load(value) for key, value in values.items()}
    (tmp_path / "sweep.yaml").write_text(
        yaml.safe_dump(
            {
                "source": "demo",
                "folder": "runs/small",
                "executor": "local",
                "overrides": overrides | {"cluster.ranks_per_client": 1},
                "grid": {"seed": [7]},
            }
        )
    )
    printed = installed("sweep", "submit", "sweep.yaml", "--wait", cwd=tmp_path)
    assert printed.startswith("submitted 1 of 1 runs") and "| complete" in printed
    installed("scripts", "mine", cwd=tmp_path)
    for file in ("slurm/job.sh", "launch/train.py", "launch/experiments/small.yaml"):
        assert (tmp_path / "mine" / file).is_file()
