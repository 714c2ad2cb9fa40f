"""Everything that a GPU has to say, in one go: exactness, memory and speed of a client.

    python -m benchmarks.gpu

Makes a LLaMA shape of random weights and, for each ZeRO stage and dtype, starts one process that
writes values into the engine, steps and reads them, trains the same batches with a plain loop over
PEFT's model and its own loss, and measures both: how far the trained values are apart (relative to
how far they moved; by SGD, since Adam's first steps follow the signs of gradients, and those of the
smallest are noise in bf16), tokens/s, the share of the card's bf16 peak at 4 N FLOP a token (LoRA:
forward 2 N, backward through frozen weights 2 N; N: the weight matrices of the blocks, so neither
attention nor logits count), and the peak memory beside `hpcfed plan`'s. The card's peak is that of
a large matrix product, measured in the same process. Then a whole federated run of two ranks, on
one card if there is only one: what it spends besides training. Without a GPU the shape is tiny and
no figure says anything about one; the commands and their checks are the same.
"""

import gc
import json
import os
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
from hpcfed.engine.optimizer import make_optimizer
from hpcfed.objectives.completion import Completion
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
ASKED = LENGTH // 5  # tokens of a prompt
HEAD = Completion(None, ())  # type: ignore[arg-type]
LIMIT = 120  # seconds of a case
ROUNDS, CLIENTS, LOCAL_STEPS = 3, 4, 10  # of the federated run
# Of the distance that values moved; bf16 keeps 8 bits.
NEAR = {"fp32": 0.01, "bf16": 0.1}


def configured(folder: str, dtype: str, stage: str) -> Config:
    """A case's configuration."""
    return resolve(
        "lora-fedavg",
        [f"model.name={folder}", f"model.dtype={dtype}", f"deepspeed=ds_configs/{stage}.json",
         f"task.max_length={LENGTH}", f"local.batch_size={BATCH}", "adapter.targets=all-linear",
         "model.head=completion", "local.optimizer=sgd", "local.lr=0.1"],
    ).config  # fmt: skip


def some_tokens(config: Config) -> tuple[Tokens, list[Ids]]:
    """Random prompts with answers, all of the same length, and their batches."""
    rng = np.random.default_rng(config.seed)
    rows = BATCH * STEPS
    ids = rng.integers(5, SHAPE["vocab_size"], rows * LENGTH).astype(np.int32)
    ends = np.arange(0, rows * LENGTH + 1, LENGTH)
    answers = np.tile(np.arange(LENGTH) >= ASKED, rows)
    tokens = Tokens(ids, None, ends, np.zeros(rows, dtype=np.int64), 0, answers=answers)
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
    torch.use_deterministic_algorithms(config.cluster.deterministic)
    peak = peak_flops(topology.device)
    if GPU:
        gc.collect()  # the plain loop's model
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    prepared = model.prepare(config, (), 0, settings, HEAD)
    matrices = sum(
        getattr(p, "ds_numel", p.numel())
        for block in prepared.adapted.blocks for p in block.parameters() if not p.requires_grad
    )  # fmt: skip
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
        "of_peak": 4 * matrices * speed / peak if peak else None,
        "peak_gb": torch.cuda.max_memory_allocated() / plan.GB if GPU else None,
        "planned_gb": planned / plan.GB,
    }  # fmt: skip


def plain(
    config: Config, tokens: Tokens, batches: list[Ids], device: torch.device
) -> tuple[torch.Tensor, float]:
    """A plain loop over PEFT's model, with the loss of transformers and torch's defaults: the
    values, and its best seconds."""
    torch.use_deterministic_algorithms(False)
    prepared = model.prepare(config, (), 0, {}, HEAD)
    adapted, local = prepared.adapted, config.local
    network: Any = adapted.network.to(device).train().backbone
    assert tokens.answers is not None
    wanted = np.where(tokens.answers, tokens.ids, -100).reshape(-1, LENGTH).astype(np.int64)
    seconds: list[float] = []
    values = torch.empty(0)
    for timed in (False, True, True):
        start_values = [
            prepared.initial[entry.values].view(entry.shape).to(device)
            for entry in adapted.layout.entries
        ]
        for parameter, value in zip(adapted.parameters, start_values, strict=True):
            parameter.data.copy_(value)
        # To compare values with, steps are made in fp32, which bf16 would round to nothing.
        held: Any = adapted.parameters if timed else start_values
        optimizer = make_optimizer(held, local)
        start = clock()
        for batch in batches:
            labels = torch.from_numpy(wanted[batch]).to(device)
            network.zero_grad()
            network(**tokens.collate(batch, device), labels=labels).loss.backward()
            nn.utils.clip_grad_norm_(adapted.parameters, local.clip)
            if not timed:
                for master, parameter in zip(held, adapted.parameters, strict=True):
                    assert parameter.grad is not None
                    master.grad = parameter.grad.float()
            optimizer.step()
            if not timed:
                for master, parameter in zip(held, adapted.parameters, strict=True):
                    parameter.data.copy_(master)
        if timed:
            seconds.append(clock() - start)
        else:
            values = torch.cat([own.detach().flatten().cpu() for own in held])
    return values, min(seconds)


def planned_bytes(config: Config) -> float:
    """`hpcfed plan`'s estimate of a step; before ZeRO-3 changes what autograd keeps."""
    outline = model.outline(config, (), 0)
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
        save(Path(folder))
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
        failed += not federated(Path(folder))
    return 1 if failed else 0


def save(folder: Path) -> None:
    """The shape, with random weights, and a tokenizer of its words."""
    import tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    with torch.device("cuda" if GPU else "cpu"):
        LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16).save_pretrained(folder)
    words = {word: index for index, word in enumerate(("[PAD]", "[UNK]", "[END]", "[BEGIN]"))}
    words |= {f"w{index}": index for index in range(len(words), SHAPE["vocab_size"])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]"
    ).save_pretrained(folder)


def federated(folder: Path) -> bool:
    """A run of two ranks, and what of its time is no training; whether it ended well."""
    rng = np.random.default_rng(0)
    data = folder / "data" / "words"
    data.mkdir(parents=True)
    for split, rows in (("train", CLIENTS * BATCH * LOCAL_STEPS), ("test", 2 * BATCH)):
        with (data / f"{split}.jsonl").open("w") as stream:
            for number in range(rows):
                words = [f"w{n}" for n in rng.integers(5, SHAPE["vocab_size"], LENGTH - 20)]
                ends = {"prompt": words[:ASKED], "completion": words[ASKED:]}
                line = {name: " ".join(own) for name, own in ends.items()}
                stream.write(json.dumps({**line, "client": str(number % CLIENTS)}) + "\n")
    out = folder / "run"
    command = [
        sys.executable, "-m", "hpcfed", "run", "lora-fedavg", "--ranks", "2",
        f"model.name={folder}", "model.head=completion", "model.dtype=bf16",
        "deepspeed=ds_configs/zero2.json", "adapter.targets=all-linear", "task.name=words",
        f"task.max_length={LENGTH}", "task.chat_template=plain", f"data.root={folder / 'data'}",
        "data.partition.kind=natural", "data.partition.column=client", "federation.clients=null",
        f"federation.per_round={CLIENTS}", f"federation.rounds={ROUNDS}", "local.epochs=1",
        f"local.batch_size={BATCH}", f"local.max_steps={LOCAL_STEPS}", f"output={out}",
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    if done.returncode:
        print(f"the federated run failed\n{(done.stdout + done.stderr)[-3000:]}")
        return False
    summary = json.loads((out / "summary.json").read_text())
    seconds = summary["seconds"]
    rounds = seconds["total"] - seconds["init"] - seconds["evaluate"]
    print(
        f"\n{ROUNDS} rounds of {CLIENTS} clients on 2 ranks, {summary['tokens']:,} tokens: "
        f"training {seconds['train']:.2f} s, besides {(rounds - seconds['train']) / rounds:.1%} "
        f"({', '.join(f'{name} {value:.2f} s' for name, value in seconds.items())})"
    )
    return True


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
