"""Write, step, read at every ZeRO stage and dtype, on one and two ranks per client."""

import json

import pytest

from tests import models
from tests.support import mpiexec

STAGES = [f"ds_configs/{name}.json" for name in ("zero0", "zero1", "zero2", "zero3", "offload")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models.save("bert", tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def partitioned(tmp_path_factory):
    """ZeRO-3 that keeps no parameter resident, however small."""
    path = tmp_path_factory.mktemp("ds") / "partitioned.json"
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    path.write_text(json.dumps({"zero_optimization": zero}))
    return str(path)


@pytest.mark.parametrize("ranks", [1, 2])
def test_fp32(folder, partitioned, ranks):
    output = mpiexec(ranks, "engine.py", str(folder), "fp32", *STAGES, partitioned)
    assert output.count(": ok") == len(STAGES) + 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_bf16(folder, partitioned, ranks):
    output = mpiexec(ranks, "engine.py", str(folder), "bf16", *STAGES[1:4], partitioned)
    assert output.count(": ok") == 4
