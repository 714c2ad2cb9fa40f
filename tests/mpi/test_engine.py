"""Write, step, read at every ZeRO stage, dtype and adapter, on one and two ranks per client."""

import json

import pytest

from tests import models
from tests.support import mpiexec

CASES = [
    f"lora:fp32:ds_configs/{name}.json" for name in ("zero0", "zero1", "zero2", "zero3", "offload")
]
CASES += [f"lora:bf16:ds_configs/{name}.json" for name in ("zero1", "zero2", "zero3")]
CASES += [
    "prefix:fp32:ds_configs/zero1.json", "prefix:bf16:ds_configs/zero2.json",
    "prefix:fp32:ds_configs/offload.json", "prefix:bf16:ds_configs/zero3.json",
    "prompt:bf16:ds_configs/zero1.json", "prompt:fp32:ds_configs/zero3.json",
]  # fmt: skip


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
    cases = [
        *CASES, f"lora:fp32:{partitioned}", f"lora:bf16:{partitioned}", f"lora:bf16:{accumulating}",
        f"prefix:bf16:{partitioned}",
    ]  # fmt: skip
    output = mpiexec(ranks, "engine.py", str(folder), *cases)
    assert output.count(": ok") == len(cases)
