"""The small federations that the cluster tests run: both systems on a tiny model."""

import json
import os
import subprocess
import sys
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

# Long enough to be disturbed a few times.
LONG = ["federation.rounds=80", "evaluation.every=40"]

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


def references(shared: Path) -> dict[str, Path]:
    """The runs that all others must equal, on one rank that nothing disturbs: fibecfed, fedpeptao,
    and fibecfed-long."""
    runs = {name: (name, ()) for name in METHODS} | {"fibecfed-long": ("fibecfed", LONG)}
    lines = [
        [method, *words(method, shared, f"{name}-here", *extra)]
        for name, (method, extra) in runs.items()
    ]
    subprocess.run(
        [sys.executable, "-c", _ONE_AFTER_THE_OTHER, json.dumps(lines)],
        cwd=ROOT, check=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return {name: shared / f"{name}-here" for name in runs}
