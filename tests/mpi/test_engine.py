"""Write, step, read at every ZeRO stage, dtype and adapter, on one and two ranks per client."""

import json
from typing import Any

import pytest

from tests.pairwise import product

FILES = {
    **dict.fromkeys(("zero0", "zero1", "zero2", "zero3", "offload")),
    # ZeRO-3 that keeps no parameter resident, however small.
    "partitioned": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
    # Gradients accumulated in fp32: DeepSpeed takes another optimizer for it in bf16.
    "accumulating": {
        "zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"},
    },
}  # fmt: skip


def legal(shape, adapter, dtype, file):
    return not (dtype == "bf16" and file in ("zero0", "offload"))


FACTORS: dict[str, list[Any]] = {
    "shape": [(1, 1), (1, 2)], "adapter": ["lora", "prefix", "prompt", "bottleneck"],
    "dtype": ["fp32", "bf16"], "file": list(FILES),
}  # fmt: skip
# Each value; the slowest, ZeRO-3 of several ranks, once.
FEW = [
    ((1, 1), "lora", "fp32", "zero0"), ((1, 2), "prefix", "bf16", "zero1"),
    ((1, 1), "lpt", "bf16", "zero2"), ((1, 2), "lora", "fp32", "zero2"),
    ((1, 1), "prompt", "bf16", "zero3"), ((1, 1), "bottleneck", "fp32", "offload"),
    ((1, 2), "idpg", "bf16", "partitioned"), ((1, 1), "lora", "bf16", "accumulating"),
]  # fmt: skip
ALL = {**FACTORS, "adapter": [*FACTORS["adapter"], "idpg", "lpt"]}
MANY = [case for case in product(ALL, legal) if case not in FEW]


def located(tmp_path, name):
    """The DeepSpeed JSON of this name: one that is shipped, or one of ours."""
    if FILES[name] is None:
        return f"ds_configs/{name}.json"
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(FILES[name]))
    return str(path)


def check(worlds, data, tmp_path, shape, adapter, dtype, file):
    worlds.call(
        shape, "tests.mpi.cases.engine:check", folder=data / "bert-classifier", adapter=adapter,
        dtype=dtype, deepspeed=located(tmp_path, file),
    )  # fmt: skip


@pytest.mark.parametrize(("shape", "adapter", "dtype", "file"), FEW)
def test_write_step_read(worlds, data, tmp_path, shape, adapter, dtype, file):
    check(worlds, data, tmp_path, shape, adapter, dtype, file)


@pytest.mark.parametrize("shape", [(1, 1)])
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, ""),
        ({"bfloat16": {"enabled": True}}, "another precision than model.dtype"),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "another precision"),
    ],
    ids=["as configured", "bfloat16", "autocast"],
)
def test_what_the_engine_uses_is_what_is_configured(worlds, data, shape, settings, words):
    """Whatever the JSON's check may have passed over."""
    folder = data / "bert-classifier"
    (said,) = worlds.call(shape, "tests.mpi.cases.engine:said_of", folder=folder, settings=settings)
    assert words in said and bool(words) == bool(said)


@pytest.mark.long
@pytest.mark.parametrize(("shape", "adapter", "dtype", "file"), MANY)
def test_write_step_read_in_full(worlds, data, tmp_path, shape, adapter, dtype, file):
    check(worlds, data, tmp_path, shape, adapter, dtype, file)
