"""Fisher, sensitivity and frozen values against obvious versions, at every ZeRO stage."""

import json

import pytest

from tests import models
from tests.support import mpiexec

# ranks -> architecture, ZeRO stage, adapter and head if not LoRA and classifier, and "+" for
# accumulation with checkpointing
CASES = {
    1: ["bert-zero0", "bert-zero0+", "bert-zero1", "bert-zero2+", "bert-zero3+", "bert-offload",
        "llama-zero0", "llama-partitioned", "bert-zero0-prefix", "bert-zero3-prefix+",
        "llama-zero0-prefix+", "bert-zero0-prompt", "gpt2-zero3-prompt+",
        "bert-zero0-prefix-cloze", "llama-zero0-prefix-label_words"],
    2: ["bert-zero1+", "bert-zero2", "bert-zero3", "bert-partitioned+", "llama-zero3+",
        "bert-zero1-prefix", "bert-zero2-prefix+", "llama-partitioned-prefix",
        "bert-zero2-prompt+", "bert-zero3-prefix-cloze", "llama-zero1-lora-label_words",
        "roberta-zero2-lora-cloze+", "llama-zero3-prompt-label_words"],
}  # fmt: skip


@pytest.mark.parametrize("ranks", CASES)
def test_importance_at_every_stage(ranks, tmp_path):
    partitioned = tmp_path / "partitioned.json"
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    partitioned.write_text(json.dumps({"zero_optimization": zero}))
    cases = []
    for name in CASES[ranks]:
        architecture, stage, *kinds = name.rstrip("+").split("-")
        adapter, head = [*kinds, *("lora", "classifier")[len(kinds) :]]
        targets = models.ARCHITECTURES[architecture][3]
        folder = tmp_path / f"{architecture}-{head}"
        if not folder.exists():
            # A language model head of tiny random weights is so flat that its curvature drowns in
            # rounding.
            wide = {} if head == "classifier" else {"initializer_range": 0.04}
            models.save(architecture, folder, head, **wide)
        file = partitioned if stage == "partitioned" else f"ds_configs/{stage}.json"
        overrides = [
            f"model.name={folder}", f"deepspeed={file}", f"adapter.targets=[{','.join(targets)}]",
            "adapter.rank=3", "cluster.threads=1", f"cluster.ranks_per_client={ranks}",
            f"adapter.kind={adapter}", "adapter.virtual_tokens=3", f"model.head={head}",
        ]  # fmt: skip
        if name.endswith("+"):
            overrides += ["local.micro_batch=2", "model.gradient_checkpointing=true"]
        cases.append({"name": name, "overrides": overrides})
    file = tmp_path / "cases.json"
    file.write_text(json.dumps(cases))
    output = mpiexec(ranks, "importance.py", str(file))
    assert output.count(": ok") == len(cases)
    print(output)
