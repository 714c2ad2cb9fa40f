"""Fisher, sensitivity, curvature, frozen values against obvious versions, at every ZeRO stage."""

from typing import Any

import pytest

from tests import models
from tests.mpi.test_engine import located
from tests.pairwise import each, product

HEADS = {"classifier": list(models.ARCHITECTURES), "cloze": ["bert", "roberta"],
         "label_words": ["gpt2", "llama"]}  # fmt: skip
# With smaller random weights the loss is so flat that its curvature drowns in rounding.
WIDTH = 0.04
FACTORS: dict[str, list[Any]] = {
    "shape": [(1, 1), (1, 2)], "architecture": list(models.ARCHITECTURES),
    "file": ["zero0", "zero1", "zero2", "zero3", "offload", "partitioned"],
    "adapter": ["lora", "prefix", "prompt", "bottleneck"], "head": list(HEADS),
    "spares": [False, True],
}  # fmt: skip


def legal(shape, architecture, file, adapter, head, spares):
    return architecture in HEADS[head]


FEW = [
    *each(FACTORS, legal), ((1, 1), "bert", "partitioned", "idpg", "classifier", True),
    ((1, 2), "llama", "zero2", "lpt", "classifier", False),
]  # fmt: skip
# One architecture for each head, with and without spares in turns.
FULL = {
    **FACTORS, "architecture": ["bert", "llama"], "spares": [False],
    "adapter": [*FACTORS["adapter"], "idpg", "lpt"],
}  # fmt: skip
USUAL = {"classifier": "bert", "cloze": "bert", "label_words": "llama"}
MANY = [
    (*case[:-1], bool(index % 2))
    for index, case in enumerate(product(FULL, lambda *case: USUAL[case[4]] == case[1]))
]
NAMES = tuple(FACTORS)


def check(worlds, tmp_path, shape, architecture, file, adapter, head, spares):
    folder = models.save(architecture, tmp_path / "model", head, initializer_range=WIDTH)
    worlds.call(
        shape, "tests.mpi.cases.importance:check", folder=folder, architecture=architecture,
        adapter=adapter, head=head, deepspeed=located(tmp_path, file), spares=spares,
    )  # fmt: skip


@pytest.mark.parametrize(NAMES, FEW)
def test_against_obvious_versions(
    worlds, tmp_path, shape, architecture, file, adapter, head, spares
):
    check(worlds, tmp_path, shape, architecture, file, adapter, head, spares)


@pytest.mark.long
@pytest.mark.parametrize(NAMES, MANY)
def test_against_obvious_versions_in_full(
    worlds, tmp_path, shape, architecture, file, adapter, head, spares
):
    check(worlds, tmp_path, shape, architecture, file, adapter, head, spares)
