"""Fisher, sensitivity and frozen values against obvious versions, at every ZeRO stage."""

import json

import pytest

from tests import models
from tests.support import mpiexec

STAGES = ("zero0", "zero1", "zero2", "zero3", "offload")


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """An encoder and a decoder, plain and with accumulation and checkpointing, at every stage."""
    base = tmp_path_factory.mktemp("importance")
    partitioned = base / "partitioned.json"
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    partitioned.write_text(json.dumps({"zero_optimization": zero}))
    files = {stage: f"ds_configs/{stage}.json" for stage in STAGES}
    files["partitioned"] = str(partitioned)
    found = []
    for architecture in ("bert", "llama"):
        targets = models.ARCHITECTURES[architecture][3]
        folder = models.save(architecture, base / architecture)
        for stage, file in files.items():
            for extras in ([], ["local.micro_batch=2", "model.gradient_checkpointing=true"]):
                found.append(
                    {
                        "name": f"{architecture}-{stage}{'-extras' if extras else ''}",
                        "overrides": [
                            f"model.name={folder}", f"deepspeed={file}", "adapter.rank=3",
                            f"adapter.targets=[{','.join(targets)}]", "cluster.threads=1", *extras,
                        ],
                    }
                )  # fmt: skip
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_importance_at_every_stage(cases, ranks, tmp_path):
    file = tmp_path / "cases.json"
    for case in cases:
        case["overrides"] = [*case["overrides"], f"cluster.ranks_per_client={ranks}"]
    file.write_text(json.dumps(cases))
    output = mpiexec(ranks, "importance.py", str(file))
    assert output.count(": ok") == len(cases)
