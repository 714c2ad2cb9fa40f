"""The small federations that the cluster tests run: both systems on a tiny model."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tests import models
from tests.mpi.variants import FIBECFED, write_data
from tests.support import ROOT

_LEFT_OUT = ("model.name", "federation.per_round", "federation.rounds", "local.lr")
SMALL = [own for own in FIBECFED if not own.startswith(_LEFT_OUT)]
SMALL += [
    "federation.per_round=4", "federation.rounds=4", "evaluation.every=2", "data.validation=0.2",
    "local.lr=0.1",
]  # fmt: skip

METHODS = {
    "fibecfed": SMALL,
    "fedpeptao": [
        *(own for own in SMALL if not own.startswith(("curriculum", "sparsity"))),
        "curriculum.warmup=1", "adapter.virtual_tokens=4",
    ],
}  # fmt: skip

# Long enough to be disturbed a few times; and for Slurm to look at time limits, every 30 s.
SOME = ["federation.rounds=60", "evaluation.every=20"]
LONG = ["federation.rounds=220", "evaluation.every=110"]

PATIENCE = 400.0  # seconds

_ONE_AFTER_THE_OTHER = """
import json, sys
from hpcfed.app.cli import main
sys.exit(max(main(["run", *words]) for words in json.loads(sys.argv[1])))
"""


def prepare(shared: Path) -> None:
    """The data and the model, in a folder that all hosts see."""
    write_data(shared)
    models.save("bert", shared / "bert", initializer_range=0.2)


def words(method: str, shared: Path, name: str, *extra: str) -> list[str]:
    """Overrides of a run of `method` in the folder shared/name; of extra the last one counts."""
    places = [f"model.name={shared / 'bert'}", f"data.root={shared}", f"output={shared / name}"]
    values = dict(own.split("=", 1) for own in [*METHODS[method], *places, *extra])
    return [f"{key}={value}" for key, value in values.items()]


RUNS: dict[str, tuple[str, list[str]]] = {
    "fibecfed": ("fibecfed", []),
    "fedpeptao": ("fedpeptao", []),
    "fibecfed-some": ("fibecfed", SOME),
    "fibecfed-long": ("fibecfed", LONG),
}


class Undisturbed:
    """The runs that others must equal, each on one rank: fibecfed, fedpeptao, fibecfed-some and
    fibecfed-long. They run beside the first tests."""

    def __init__(self, shared: Path) -> None:
        self._shared = shared

    def begin(self) -> None:
        """Start them."""
        lines = [
            [method, *words(method, self._shared, f"{name}-here", *extra), "--no-live"]
            for name, (method, extra) in RUNS.items()
        ]
        command = [sys.executable, "-c", _ONE_AFTER_THE_OTHER, json.dumps(lines)]
        with (self._shared / "undisturbed.out").open("w") as log:
            subprocess.Popen(
                ["nice", *command], cwd=ROOT, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def __getitem__(self, name: str) -> Path:
        """The run directory, when it is complete."""
        out, until = self._shared / f"{name}-here", time.monotonic() + PATIENCE
        while not (out / "summary.json").exists():
            log = self._shared / "undisturbed.out"
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.2)
        return out
