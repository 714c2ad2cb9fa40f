"""Fisher, sensitivity and frozen values against obvious versions, at every ZeRO stage."""

import json

import pytest

from tests import models
from tests.support import mpiexec

# ranks -> architecture, ZeRO stage, and "+" for accumulation with checkpointing
CASES = {
    1: ["bert-zero0", "bert-zero0+", "bert-zero1", "bert-zero2+", "bert-zero3+", "bert-offload",
        "llama-zero0", "llama-partitioned"],
    2: ["bert-zero1+", "bert-zero2", "bert-zero3", "bert-partitioned+", "llama-zero3+"],
}  # fmt: skip


@pytest.mark.parametrize("ranks", CASES)
def test_importance_at_every_stage(ranks, tmp_path):
    partitioned = tmp_path / "partitioned.json"
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    partitioned.write_text(json.dumps({"zero_optimization": zero}))
    cases = []
    for name in CASES[ranks]:
        architecture, stage = name.rstrip("+").split("-")
        targets = models.ARCHITECTURES[architecture][3]
        folder = tmp_path / architecture
        if not folder.exists():
            models.save(architecture, folder)
        file = partitioned if stage == "partitioned" else f"ds_configs/{stage}.json"
        overrides = [
            f"model.name={folder}", f"deepspeed={file}", f"adapter.targets=[{','.join(targets)}]",
            "adapter.rank=3", "cluster.threads=1", f"cluster.ranks_per_client={ranks}",
        ]  # fmt: skip
        if name.endswith("+"):
            overrides += ["local.micro_batch=2", "model.gradient_checkpointing=true"]
        cases.append({"name": name, "overrides": overrides})
    file = tmp_path / "cases.json"
    file.write_text(json.dumps(cases))
    output = mpiexec(ranks, "importance.py", str(file))
    assert output.count(": ok") == len(cases)
    print(output)
