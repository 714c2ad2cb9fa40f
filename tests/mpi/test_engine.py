"""Write, step, read at every ZeRO stage and dtype, on one and two ranks per client."""

import json

import pytest

from tests import models
from tests.support import mpiexec

CASES = [f"fp32:ds_configs/{name}.json" for name in ("zero0", "zero1", "zero2", "zero3", "offload")]
CASES += [f"bf16:ds_configs/{name}.json" for name in ("zero1", "zero2", "zero3")]


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


@pytest.fixture(scope="module")
def accumulating(tmp_path_factory):
    """bf16 with gradients accumulated in fp32: DeepSpeed takes another optimizer for it."""
    path = tmp_path_factory.mktemp("ds") / "accumulating.json"
    types = {"grad_accum_dtype": "fp32"}
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}, "data_types": types}))
    return str(path)


@pytest.mark.parametrize("ranks", [1, 2])
def test_write_step_read(folder, partitioned, accumulating, ranks):
    cases = [*CASES, f"fp32:{partitioned}", f"bf16:{partitioned}", f"bf16:{accumulating}"]
    output = mpiexec(ranks, "engine.py", str(folder), *cases)
    assert output.count(": ok") == len(cases)
