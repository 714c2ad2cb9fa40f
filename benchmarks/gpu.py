"""Everything that a GPU has to say, in one go: exactness, memory and speed of a client.

    python -m benchmarks.gpu

Makes a LLaMA shape of random weights and, for each ZeRO stage and dtype, starts one process that
writes values into the engine, steps and reads them, trains the same batches with a plain PyTorch
loop over PEFT, and measures both: how far the trained values are apart (relative to how far they
moved), tokens/s, the share of the card's bf16 peak at 4 N FLOP a token (LoRA: forward 2 N, backward
through frozen weights 2 N), and the peak memory beside `hpcfed plan`'s. The card's peak is that of
a large matrix product, measured in the same process. Without a GPU the shape is tiny and no figure
says anything about one; the command and its checks are the same.
"""

import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

from hpcfed import model
from hpcfed.app import plan
from hpcfed.app.run import quiet
from hpcfed.cluster.topology import connect_slots, connect_world
from hpcfed.data.batches import Ids, Tokens
from hpcfed.engine.engine import Engine
from hpcfed.settings import deepspeed_config
from hpcfed.settings.config import Config
from hpcfed.settings.resolve import resolve

GPU = torch.cuda.is_available()
# What LLaMA-3.2-1B has, with a smaller vocabulary.
SHAPE = {
    "hidden_size": 2048 if GPU else 64, "intermediate_size": 8192 if GPU else 128,
    "num_hidden_layers": 16 if GPU else 2, "num_attention_heads": 32 if GPU else 4,
    "num_key_value_heads": 8 if GPU else 2, "vocab_size": 32000 if GPU else 1000,
    "max_position_embeddings": 2048, "pad_token_id": 0,
}  # fmt: skip
LENGTH, BATCH, STEPS = (1024, 8, 4) if GPU else (32, 4, 3)
CASES = (
    ("fp32", "zero0"), ("fp32", "zero1"), ("fp32", "zero2"), ("fp32", "zero3"),
    ("bf16", "zero1"), ("bf16", "zero2"), ("bf16", "zero3"),
)  # fmt: skip
LABELS = ("a", "b")
LIMIT = 120  # seconds of a case
# Of the distance that values moved; bf16 keeps 8 bits, and the plain loop has no fp32 masters.
NEAR = {"fp32": 0.02, "bf16": 0.25}


def configured(folder: str, dtype: str, stage: str) -> Config:
    """A case's configuration."""
    return resolve(
        "lora-fedavg",
        [f"model.name={folder}", f"model.dtype={dtype}", f"deepspeed=ds_configs/{stage}.json",
         f"task.max_length={LENGTH}", f"local.batch_size={BATCH}", "adapter.targets=all-linear"],
    ).config  # fmt: skip


def some_tokens(config: Config) -> tuple[Tokens, list[Ids]]:
    """Random texts, all of the same length, and their batches."""
    rng = np.random.default_rng(config.seed)
    rows = BATCH * STEPS
    ids = rng.integers(5, SHAPE["vocab_size"], rows * LENGTH).astype(np.int32)
    ends = np.arange(0, rows * LENGTH + 1, LENGTH)
    tokens = Tokens(ids, None, ends, rng.integers(0, len(LABELS), rows), 0)
    return tokens, [np.arange(BATCH * step, BATCH * (step + 1)) for step in range(STEPS)]


def measure(folder: str, dtype: str, stage: str) -> dict[str, Any]:
    """One case, in this process."""
    quiet()
    config = configured(folder, dtype, stage)
    topology = connect_slots(connect_world(), config.cluster)
    tokens, batches = some_tokens(config)
    settings = deepspeed_config.load(config)
    planned = planned_bytes(config)
    plain_values, plain_seconds = plain(config, tokens, batches, topology.device)
    peak = peak_flops(topology.device)
    if GPU:
        gc.collect()  # the plain loop's model
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    prepared = model.prepare(config, LABELS, 0, settings)
    engine = Engine(prepared, config.local, settings, topology)
    engine.load(prepared.initial)
    exact = torch.equal(engine.read(), prepared.initial)
    engine.train(batches, tokens, 0)
    trained = engine.read()
    seconds = []
    for _ in range(2):
        engine.load(prepared.initial)
        start = clock()
        engine.train(batches, tokens, 0)
        seconds.append(clock() - start)
    repeats = torch.equal(engine.read(), trained)
    moved = (plain_values - prepared.initial).norm()
    count = BATCH * STEPS * LENGTH
    speed = count / min(seconds)
    engine.close()
    return {
        "dtype": dtype, "stage": stage, "exact": exact, "repeats": repeats,
        "apart": float((trained - plain_values).norm() / moved),
        "tokens_per_second": speed, "of_plain": speed * plain_seconds / count,
        "of_peak": 4 * prepared.backbone_values * speed / peak if peak else None,
        "peak_gb": torch.cuda.max_memory_allocated() / plan.GB if GPU else None,
        "planned_gb": planned / plan.GB, "backbone": prepared.backbone_values,
    }  # fmt: skip


def plain(
    config: Config, tokens: Tokens, batches: list[Ids], device: torch.device
) -> tuple[torch.Tensor, float]:
    """A plain loop over the same model, adapter and batches: the values, and its best seconds."""
    prepared = model.prepare(config, LABELS, 0, {})
    adapted, local = prepared.adapted, config.local
    network = adapted.network.to(device).train()
    best = float("inf")
    for _ in range(3):  # the first warms up
        for parameter, entry in zip(adapted.parameters, adapted.layout.entries, strict=True):
            parameter.data.copy_(prepared.initial[entry.values].view(entry.shape))
        optimizer = torch.optim.AdamW(
            adapted.parameters, lr=local.lr, weight_decay=local.weight_decay
        )
        start = clock()
        for batch in batches:
            labels = torch.from_numpy(tokens.labels[batch]).to(device)
            logits = network(**tokens.collate(batch, device)).float()
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits, labels).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(adapted.parameters, local.clip)
            optimizer.step()
        best = min(best, clock() - start)
    parts = [p.detach().float().flatten().cpu() for p in adapted.parameters]
    return torch.cat(parts), best


def planned_bytes(config: Config) -> float:
    """`hpcfed plan`'s estimate of a step; before ZeRO-3 changes what autograd keeps."""
    outline = model.outline(config, LABELS, 0)
    activations, _ = plan.activation_bytes(outline, plan.micro_batch(config), LENGTH)
    settings = deepspeed_config.load(config)
    stage = deepspeed_config.zero_stage(settings)
    return plan.memory(config, outline, stage, settings, activations).total


def peak_flops(device: torch.device, size: int = 8192) -> float:
    """FLOP/s of a bf16 matrix product of random values; 0 without a GPU."""
    if not GPU:
        return 0.0
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for repeats in (3, 10):
        start = clock()
        for _ in range(repeats):
            left @ right
        seconds = clock() - start
    return 2 * size**3 * 10 / seconds


def clock() -> float:
    """Seconds, once the device has done all that was asked of it."""
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> int:
    """All cases; 1 if one failed or was not exact."""
    if len(sys.argv) > 1:
        print(json.dumps(measure(*sys.argv[1:])))
        return 0
    where = torch.cuda.get_device_name() if GPU else "no GPU: tiny sizes, which say nothing of one"
    print(f"{where}; torch {torch.__version__}; {BATCH} texts of {LENGTH} tokens, {STEPS} steps")
    print(
        "| dtype | stage | exact | same again | apart | tokens/s | of plain | of peak | GB | plan |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    failed = 0
    with TemporaryDirectory() as folder:
        from transformers import LlamaConfig, LlamaModel

        torch.manual_seed(0)
        LlamaModel(LlamaConfig(**SHAPE)).to(torch.bfloat16).save_pretrained(Path(folder))
        for dtype, stage in CASES:
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.gpu", folder, dtype, stage],
                capture_output=True, text=True, timeout=LIMIT,
            )  # fmt: skip
            if done.returncode:
                failed += 1
                print(f"| {dtype} | {stage} | failed | | | | | | | |\n{done.stderr[-1500:]}")
                continue
            found = json.loads(done.stdout.strip().splitlines()[-1])
            failed += not (found["exact"] and found["repeats"] and found["apart"] < NEAR[dtype])
            print(row(found), flush=True)
    return 1 if failed else 0


def row(found: dict[str, Any]) -> str:
    """A case as a line of the table."""
    peak = "" if found["of_peak"] is None else f"{found['of_peak']:.1%}"
    held = "" if found["peak_gb"] is None else f"{found['peak_gb']:.2f}"
    yes = {True: "yes", False: "no"}
    return (
        f"| {found['dtype']} | {found['stage']} | {yes[found['exact']]} | {yes[found['repeats']]} "
        f"| {found['apart']:.1e} | {found['tokens_per_second']:,.0f} | {found['of_plain']:.2f} "
        f"| {peak} | {held} | {found['planned_gb']:.3g} |"
    )


if __name__ == "__main__":
    sys.exit(main())
