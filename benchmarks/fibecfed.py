"""Does FibecFed win? The table against LoRA FedAvg and FibecFed's own ablations.

    python -m benchmarks.fibecfed tune            learning rates, on validation data
    python -m benchmarks.fibecfed run             all cells of the table
    python -m benchmarks.fibecfed clock           both methods alone on the machine, for seconds
    python -m benchmarks.fibecfed table           the table, from the finished cells

Two runs side by side, one thread each, but for `clock`. Finished cells are kept in
benchmarks/fibecfed.jsonl and not run again. Needs the real tasks in ../shared/datasets.
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
from statistics import mean
from typing import Any

import numpy as np

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


def clock_cells(rates: dict[str, float]) -> Iterator[dict[str, Any]]:
    """Runs of which the seconds count: nothing else may run on the machine."""
    for task in ("mr", "trec"):
        for method in ("lora-fedavg", "fibecfed"):
            yield {**cell(method, task, 1.0, SEEDS[0], rates[method]), "alone": True}


def finished() -> list[dict[str, Any]]:
    """All finished cells."""
    lines = CELLS.read_text().splitlines() if CELLS.exists() else []
    return [json.loads(line) for line in lines]


def find(cells: list[dict[str, Any]], wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The finished cell, if it is there."""
    return next((c for c in cells if all(c.get(k) == v for k, v in wanted.items())), None)


def best_rates(cells: list[dict[str, Any]]) -> dict[str, float]:
    """Preset -> the rate with the best validation accuracy, mean of the second half of the rounds
    (a single round jumps by 0.1) and of both tuning tasks."""
    found = {}
    for method in ("lora-fedavg", "fibecfed"):
        scores = {rate: tuned(cells, method, rate, "mr", "trec") for rate in RATES}
        found[method] = max(scores, key=lambda rate: scores[rate])
    return found


def tuned(cells: list[dict[str, Any]], method: str, rate: float, *tasks: str) -> float:
    """Mean validation accuracy of a rate over the second half of the rounds and the tasks."""
    scores = []
    for task in tasks:
        own = find(cells, cell(method, task, 1.0, TUNING_SEED, rate))
        if own is None:
            raise SystemExit("Some learning-rate runs are missing; start with `tune`.")
        points = [point["validation"] for point in own["curve"]]
        scores.append(mean(points[len(points) // 2 :]))
    return mean(scores)


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
        "words": [word for word in words if not word.startswith("output=")],
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


def report(cells: list[dict[str, Any]]) -> None:
    """Print both tables as Markdown: the learning rates, and the methods."""
    print("| method | lr | mr | trec | mean |\n|---|---|---|---|---|")
    for method in ("lora-fedavg", "fibecfed"):
        for rate in RATES:
            mr, trec = (tuned(cells, method, rate, task) for task in ("mr", "trec"))
            print(f"| {method} | {rate:g} | {mr:.3f} | {trec:.3f} | {(mr + trec) / 2:.3f} |")
    rates = best_rates(cells)
    print(f"\nlearning rates: {rates}\n")
    titles = (
        "task", "Dirichlet", "method", "seeds", "test, round 20", "spread", "test, best round",
        "difference at round 20", "samples", "uploads",
    )  # fmt: skip
    print("| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|")
    for task, alpha in dict.fromkeys((c["task"], c["alpha"]) for c in table_cells(rates)):
        base = group(cells, "lora-fedavg", task, alpha, rates)
        for method in METHODS:
            own = group(cells, method, task, alpha, rates)
            both = sorted(own.keys() & base.keys())
            if both:
                print(row(task, alpha, method, [own[s] for s in both], [base[s] for s in both]))

    report_seconds(cells, rates)


def report_seconds(cells: list[dict[str, Any]], rates: dict[str, float]) -> None:
    """Print what `clock` measured: all rounds, and until the target; evaluation left out."""
    print("\n| task | method | all rounds | to the target | share |\n|---|---|---|---|---|")
    paid: dict[str, float | None] = {}
    for wanted in clock_cells(rates):
        one = find(cells, wanted)
        other = find(cells, {**wanted, "method": "lora-fedavg", "lr": rates["lora-fedavg"]})
        if one is None or other is None:
            continue
        spent = first(one, target(other), "seconds")
        theirs = paid.setdefault(wanted["task"], spent)
        until = "not reached" if spent is None else f"{spent:.0f} s"
        share = f"{spent / theirs:.2f}" if spent and theirs else ""
        whole = f"{one['curve'][-1]['seconds']:.0f} s"
        print(f"| {wanted['task']} | {wanted['method']} | {whole} | {until} | {share} |")


def group(
    cells: list[dict[str, Any]], method: str, task: str, alpha: float, rates: dict[str, float]
) -> dict[int, dict[str, Any]]:
    """Seed -> a method's finished cell."""
    found = {s: find(cells, cell(method, task, alpha, s, rates[preset(method)])) for s in SEEDS}
    return {seed: c for seed, c in found.items() if c is not None}


def row(
    task: str, alpha: float, method: str, own: list[dict[str, Any]], base: list[dict[str, Any]]
) -> str:
    """A line of the table: accuracy over seeds, and what it cost to reach the targets, as a share
    of what LoRA FedAvg paid for the same seeds."""
    tests = [c["test"] for c in own]
    parts = [
        task, f"{alpha:g}", method, str(len(own)), f"{mean(tests):.3f}",
        f"{min(tests):.3f}-{max(tests):.3f}", f"{mean(c['best'] for c in own):.3f}",
        "" if method == "lora-fedavg" else difference(own, base),
    ]  # fmt: skip
    for what in ("samples", "up"):
        ours = [first(c, target(b), what) for c, b in zip(own, base, strict=True)]
        theirs = [first(b, target(b), what) for b in base]
        pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b]
        text = f"{sum(a for a, _ in pairs) / sum(b for _, b in pairs):.2f}" if pairs else "none"
        if len(pairs) < len(own):
            text += f" ({len(pairs)} of {len(own)} reach it)"
        parts.append(text)
    return "| " + " | ".join(parts) + " |"


def target(base: dict[str, Any]) -> float:
    """95 % of LoRA FedAvg's final validation accuracy with this seed."""
    return 0.95 * float(base["curve"][-1]["validation"])


def first(own: dict[str, Any], wanted: float, what: str) -> float | None:
    """What had been spent when the validation accuracy first reached the target."""
    return next((p[what] for p in own["curve"] if p["validation"] >= wanted), None)


def difference(own: list[dict[str, Any]], base: list[dict[str, Any]]) -> str:
    """Difference of test accuracy after the last round, and its 95 % interval by the paired
    bootstrap over test rows: each row's correctness is the mean over seeds, so what another seed
    would give is not in the interval; the spread shows that."""
    ours, theirs = (
        np.array([[int(r) for r in c["right"]] for c in runs]).mean(0) for runs in (own, base)
    )
    gain = ours - theirs
    rng = np.random.default_rng(0)
    draws = [gain[rng.integers(0, len(gain), len(gain))].mean() for _ in range(10_000)]
    low, high = np.quantile(draws, [0.025, 0.975])
    return f"{gain.mean():+.3f} ({low:+.3f} to {high:+.3f})"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("tune", "run", "clock", "table"))
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    options = parser.parse_args()
    if options.what == "tune":
        run_cells(list(tuning()), options.jobs)
        print(best_rates(finished()))
    elif options.what == "run":
        run_cells(list(table_cells(best_rates(finished()))), options.jobs)
    elif options.what == "clock":
        run_cells(list(clock_cells(best_rates(finished()))), 1)
    else:
        report(finished())


if __name__ == "__main__":
    main()
