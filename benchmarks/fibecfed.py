"""Does FibecFed win? The table against LoRA FedAvg and FibecFed's own ablations.

    python -m benchmarks.fibecfed tune            learning rates, on validation data
    python -m benchmarks.fibecfed run             all cells of the table
    python -m benchmarks.fibecfed table           the table, from the finished cells

Two runs side by side, one thread each. Finished cells are kept in benchmarks/fibecfed.jsonl and
not run again. Needs the real tasks in ../shared/datasets.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CELLS = Path(__file__).with_suffix(".jsonl")
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
SEEDS = (1, 2, 3)
TUNING_SEED = 42

COMMON = [
    "data.root=../shared/datasets", "task.max_train=2000", "task.max_length=64",
    "federation.clients=50", "federation.per_round=5", "federation.rounds=20",
    "evaluation.every=2", "cluster.threads=1",
]  # fmt: skip

METHODS: dict[str, list[str]] = {
    "lora-fedavg": [],
    "fibecfed": [],
    "random order": ["curriculum.difficulty=random"],
    "random layers": ["layers.score=random"],
    "all layers shared": ["layers.score=all"],
    "no sparsity": ["sparsity.keep=1"],
}


def preset(method: str) -> str:
    """The preset that a method of the table is made from."""
    return "lora-fedavg" if method == "lora-fedavg" else "fibecfed"


def cell(method: str, task: str, alpha: float, seed: int, rate: float) -> dict[str, Any]:
    """What identifies a run."""
    return {"method": method, "task": task, "alpha": alpha, "seed": seed, "lr": rate}


def tuning() -> Iterator[dict[str, Any]]:
    """The learning-rate runs: both methods, the same rates."""
    for method in ("lora-fedavg", "fibecfed"):
        for rate in RATES:
            for task in ("mr", "trec"):
                yield cell(method, task, 1.0, TUNING_SEED, rate)


def table_cells(rates: dict[str, float]) -> Iterator[dict[str, Any]]:
    """The runs of the table, the most telling first."""
    main = ("lora-fedavg", "fibecfed")
    for methods, tasks in (
        (main, (("mr", 0.3), ("trec", 0.3), ("mr", 1.0), ("trec", 1.0))),
        (main, (("rte", 1.0), ("subj", 1.0))),
        (tuple(METHODS)[2:], (("mr", 0.3), ("trec", 0.3), ("mr", 1.0), ("trec", 1.0))),
    ):
        for task, alpha in tasks:
            for seed in SEEDS:
                for method in methods:
                    yield cell(method, task, alpha, seed, rates[preset(method)])


def finished() -> list[dict[str, Any]]:
    """All finished cells."""
    lines = CELLS.read_text().splitlines() if CELLS.exists() else []
    return [json.loads(line) for line in lines]


def find(cells: list[dict[str, Any]], wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The finished cell, if it is there."""
    return next((c for c in cells if all(c[k] == v for k, v in wanted.items())), None)


def best_rates(cells: list[dict[str, Any]]) -> dict[str, float]:
    """Preset -> the rate with the best final validation accuracy, mean of both tuning tasks."""
    found = {}
    for method in ("lora-fedavg", "fibecfed"):
        scores = {}
        for rate in RATES:
            own = [
                find(cells, cell(method, task, 1.0, TUNING_SEED, rate)) for task in ("mr", "trec")
            ]
            done = [c["curve"][-1]["validation"] for c in own if c]
            if len(done) < len(own):
                raise SystemExit("Some learning-rate runs are missing; start with `tune`.")
            scores[rate] = sum(done) / len(done)
        found[method] = max(scores, key=lambda rate: scores[rate])
    return found


def run_cells(wanted: list[dict[str, Any]], jobs: int) -> None:
    """Run what is not finished, `jobs` at a time."""
    lock = threading.Lock()
    cells = finished()
    todo = [c for c in wanted if find(cells, c) is None]
    print(f"{len(wanted) - len(todo)} cells are finished, {len(todo)} to go", flush=True)

    def work(own: dict[str, Any]) -> None:
        result = run_cell(own)
        with lock, CELLS.open("a") as stream:
            stream.write(json.dumps(result) + "\n")
            print(f"{own}: test {result['test']:.4f}, {result['seconds']:.0f} s", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, todo))


def run_cell(own: dict[str, Any]) -> dict[str, Any]:
    """One run in a process of its own; what the table needs of it."""
    name = "-".join(str(v).replace(" ", "_") for v in own.values())
    out = ROOT / "runs" / "fibecfed" / name
    shutil.rmtree(out, ignore_errors=True)
    words = [
        preset(own["method"]), *COMMON, *METHODS[own["method"]], f"task.name={own['task']}",
        f"data.partition.alpha={own['alpha']}", f"seed={own['seed']}", f"local.lr={own['lr']}",
        f"output={out}",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "hpcfed", "run", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{own}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    summary = json.loads((out / "summary.json").read_text())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    predictions = json.loads((out / "predictions.json").read_text())
    right = [
        int(a == b) for a, b in zip(predictions["personal"], predictions["label"], strict=True)
    ]
    return {
        **own,
        "test": summary["accuracy"]["personal"],
        "best": summary["best"]["personal"]["accuracy"],
        "majority": summary["majority"],
        "seconds": summary["seconds"]["total"],
        "curve": list(curve(lines)),
        "right": "".join(map(str, right)),
    }


def curve(lines: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """At each validation: its accuracy, and what had been spent until then."""
    spent = {"samples": 0, "up": 0, "down": 0, "seconds": 0.0}
    for line in lines:
        spent["samples"] += line["samples"]
        spent["up"] += line["bytes"]["up"]
        spent["down"] += line["bytes"]["down"]
        spent["seconds"] += sum(v for k, v in line["seconds"].items() if k != "evaluate")
        if "validation" in line:
            validation = line["validation"]["personal"]["accuracy"]
            yield {"round": line["round"], "validation": validation, **spent}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("tune", "run", "table"))
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    options = parser.parse_args()
    if options.what == "tune":
        run_cells(list(tuning()), options.jobs)
        print(best_rates(finished()))
    elif options.what == "run":
        run_cells(list(table_cells(best_rates(finished()))), options.jobs)


if __name__ == "__main__":
    main()
