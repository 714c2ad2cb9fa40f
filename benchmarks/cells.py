"""Studies of whole runs: cells of a table, each a run in a process of its own, and what they cost.

A study names its methods, of which one is the base; learning rates are tuned on validation data;
finished cells are kept in a JSONL file and not run again.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (1, 2, 3)
TUNING_SEED = 42
TUNING_TASKS = ("mr", "trec")

COMMON = [
    "data.root=../shared/datasets", "task.max_train=2000", "task.max_length=64",
    "federation.clients=50", "federation.per_round=5", "federation.rounds=20",
    "evaluation.every=2", "cluster.threads=1",
]  # fmt: skip

Cell = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """A line of the table: a preset, what it changes of it, and whose learning rate it takes."""

    preset: str
    overrides: tuple[str, ...] = ()
    rate_of: str = ""  # another method; empty: it is tuned itself


@dataclass(frozen=True)
class Study:
    """A table's methods, by name; `base` is what the others are compared with."""

    file: Path
    methods: dict[str, Method]
    base: str
    rates: tuple[float, ...]

    @property
    def tuned(self) -> list[str]:
        """Methods with a learning rate of their own."""
        return [name for name, method in self.methods.items() if not method.rate_of]

    def cell(self, method: str, task: str, alpha: float, seed: int, rate: float) -> Cell:
        """What identifies a run."""
        return {"method": method, "task": task, "alpha": alpha, "seed": seed, "lr": rate}

    def tuning(self) -> Iterator[Cell]:
        """The learning-rate runs: the same rates for all."""
        for method in self.tuned:
            for rate in self.rates:
                for task in TUNING_TASKS:
                    yield self.cell(method, task, 1.0, TUNING_SEED, rate)

    def cells(
        self, methods: Iterable[str], tasks: Iterable[tuple[str, float]], seeds: Iterable[int]
    ) -> Iterator[Cell]:
        """Runs at the tuned rates: each task and seed, the methods side by side."""
        rates = self.best_rates()
        methods, seeds = tuple(methods), tuple(seeds)
        for task, alpha in tasks:
            for seed in seeds:
                for method in methods:
                    yield self.cell(method, task, alpha, seed, rates[method])

    def finished(self) -> list[Cell]:
        """All finished cells."""
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        return [json.loads(line) for line in lines]

    def best_rates(self) -> dict[str, float]:
        """Method -> the rate with the best validation accuracy, mean of the tuning tasks."""
        done = self.finished()
        best: dict[str, float] = {}
        for method in self.tuned:
            scores = {rate: self.score(done, method, rate, TUNING_TASKS) for rate in self.rates}
            best[method] = max(scores, key=lambda rate: scores[rate])
        return {name: best[method.rate_of or name] for name, method in self.methods.items()}

    def score(self, done: list[Cell], method: str, rate: float, tasks: Iterable[str]) -> float:
        """Mean validation accuracy of a rate over the second half of the rounds and the tasks."""
        scores = []
        for task in tasks:
            cell = find(done, self.cell(method, task, 1.0, TUNING_SEED, rate))
            if cell is None:
                raise SystemExit("Some learning-rate runs are missing; start with `tune`.")
            scores.append(late_validation(cell))
        return mean(scores)

    def tune(self, jobs: int) -> None:
        """Run and print the learning rates."""
        self.run(self.tuning(), jobs)
        print(self.best_rates())

    def run(self, wanted: Iterable[Cell], jobs: int) -> None:
        """Run what is not finished, `jobs` at a time."""
        lock = threading.Lock()
        done, cells = self.finished(), list(wanted)
        todo = [cell for cell in cells if find(done, cell) is None]
        print(f"{len(cells) - len(todo)} cells are finished, {len(todo)} to go", flush=True)

        def work(cell: Cell) -> None:
            result = run_cell(cell, self.methods[cell["method"]], self.file.stem)
            with lock, self.file.open("a") as stream:
                stream.write(json.dumps(result) + "\n")
                print(f"{cell}: test {result['test']:.4f}, {result['seconds']:.0f} s", flush=True)

        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(work, todo))

    def report(self, tasks: Iterable[tuple[str, float]]) -> None:
        """Print the learning rates and the methods as Markdown tables."""
        done = self.finished()
        print("| method | lr | mr | trec | mean |\n|---|---|---|---|---|")
        for method in self.tuned:
            for rate in self.rates:
                mr, trec = (self.score(done, method, rate, [task]) for task in TUNING_TASKS)
                print(f"| {method} | {rate:g} | {mr:.3f} | {trec:.3f} | {(mr + trec) / 2:.3f} |")
        rates = self.best_rates()
        print(f"\nlearning rates: { {name: rates[name] for name in self.tuned} }\n")
        titles = (
            "task", "Dirichlet", "method", "seeds", "test, round 20", "spread", "test, best round",
            "difference at round 20", "samples", "uploads",
        )  # fmt: skip
        print("| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|")
        for task, alpha in tasks:
            base = self._group(done, self.base, task, alpha, rates)
            for method in self.methods:
                cells = self._group(done, method, task, alpha, rates)
                both = sorted(cells.keys() & base.keys())
                if both:
                    pair = [cells[s] for s in both], [base[s] for s in both]
                    print(self._row(task, alpha, method, *pair))

    def _group(
        self, done: list[Cell], method: str, task: str, alpha: float, rates: dict[str, float]
    ) -> dict[int, Cell]:
        """Seed -> a method's finished cell."""
        cells = {s: find(done, self.cell(method, task, alpha, s, rates[method])) for s in SEEDS}
        return {seed: cell for seed, cell in cells.items() if cell is not None}

    def _row(
        self, task: str, alpha: float, method: str, cells: list[Cell], base: list[Cell]
    ) -> str:
        """A line of the table: accuracy over seeds, and what it cost to reach the targets, as a
        share of what the base paid for the same seeds."""
        tests = [c["test"] for c in cells]
        parts = [
            task, f"{alpha:g}", method, str(len(cells)), f"{mean(tests):.3f}",
            f"{min(tests):.3f}-{max(tests):.3f}", f"{mean(c['best'] for c in cells):.3f}",
            "" if method == self.base else difference(cells, base),
        ]  # fmt: skip
        for what in ("samples", "up"):
            ours = [first(c, target(b), what) for c, b in zip(cells, base, strict=True)]
            theirs = [first(b, target(b), what) for b in base]
            pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b]
            text = f"{sum(a for a, _ in pairs) / sum(b for _, b in pairs):.2f}" if pairs else "none"
            if len(pairs) < len(cells):
                text += f" ({len(pairs)} of {len(cells)} reach it)"
            parts.append(text)
        return "| " + " | ".join(parts) + " |"

    def clock_cells(self, methods: Iterable[str]) -> list[Cell]:
        """Runs of which the seconds count: nothing else may run on the machine."""
        cells = self.cells(methods, [(task, 1.0) for task in TUNING_TASKS], SEEDS[:1])
        return [{**cell, "alone": True} for cell in cells]

    def report_seconds(self, methods: Iterable[str]) -> None:
        """Print what was clocked: all rounds, and until the target; evaluation left out."""
        print("\n| task | method | all rounds | to the target | share |\n|---|---|---|---|---|")
        done, rates = self.finished(), self.best_rates()
        paid: dict[str, float | None] = {}
        for wanted in self.clock_cells(methods):
            one = find(done, wanted)
            other = find(done, {**wanted, "method": self.base, "lr": rates[self.base]})
            if one is None or other is None:
                continue
            spent = first(one, target(other), "seconds")
            theirs = paid.setdefault(wanted["task"], spent)
            until = "not reached" if spent is None else f"{spent:.0f} s"
            fraction = f"{spent / theirs:.2f}" if spent and theirs else ""
            whole = f"{one['curve'][-1]['seconds']:.0f} s"
            print(f"| {wanted['task']} | {wanted['method']} | {whole} | {until} | {fraction} |")


def variant(preset: str, *overrides: str) -> Method:
    """A tuned method, changed in something, at its learning rate."""
    return Method(preset, overrides, rate_of=preset)


def command_line(doc: str, actions: Mapping[str, Callable[[int], None]]) -> None:
    """Parse `what` and --jobs, and do it. doc: of the module."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("what", choices=actions)
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    options = parser.parse_args()
    actions[options.what](options.jobs)


def late_validation(cell: Cell) -> float:
    """Mean validation accuracy of the second half of the rounds; a single round jumps by 0.1."""
    points = [point["validation"] for point in cell["curve"]]
    return mean(points[len(points) // 2 :])


def find(cells: list[Cell], wanted: Cell) -> Cell | None:
    """The finished cell, if it is there."""
    return next((c for c in cells if all(c.get(k) == v for k, v in wanted.items())), None)


def run_cell(cell: Cell, method: Method, folder: str) -> Cell:
    """One run in a process of its own; what the table needs of it."""
    name = "-".join(str(v).replace(" ", "_") for v in cell.values())
    out = ROOT / "runs" / folder / name
    shutil.rmtree(out, ignore_errors=True)
    words = [
        method.preset, *COMMON, *method.overrides, f"task.name={cell['task']}",
        f"data.partition.alpha={cell['alpha']}", f"seed={cell['seed']}", f"local.lr={cell['lr']}",
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
        raise SystemExit(f"{cell}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    summary = json.loads((out / "summary.json").read_text())
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    predictions = json.loads((out / "predictions.json").read_text())
    right = [
        int(a == b) for a, b in zip(predictions["personal"], predictions["label"], strict=True)
    ]
    return {
        **cell,
        "words": [word for word in words if not word.startswith("output=")],
        "test": summary["accuracy"]["personal"],
        "best": summary["best"]["personal"]["accuracy"],
        "majority": summary["majority"],
        "seconds": summary["seconds"]["total"],
        "curve": list(curve(records)),
        "right": "".join(map(str, right)),
    }


def curve(records: list[Cell]) -> Iterator[Cell]:
    """At each validation: its accuracy, and what had been spent until then."""
    spent = {"samples": 0, "up": 0, "down": 0, "seconds": 0.0}
    for record in records:
        spent["samples"] += record["samples"]
        spent["up"] += record["bytes"]["up"]
        spent["down"] += record["bytes"]["down"]
        spent["seconds"] += sum(v for k, v in record["seconds"].items() if k != "evaluate")
        if "validation" in record:
            validation = record["validation"]["personal"]["accuracy"]
            yield {"round": record["round"], "validation": validation, **spent}


def target(base: Cell) -> float:
    """95 % of the base's final validation accuracy with this seed."""
    return 0.95 * float(base["curve"][-1]["validation"])


def first(cell: Cell, wanted: float, what: str) -> float | None:
    """What had been spent when the validation accuracy first reached the target."""
    return next((p[what] for p in cell["curve"] if p["validation"] >= wanted), None)


def difference(cells: list[Cell], base: list[Cell]) -> str:
    """Difference of test accuracy after the last round, and its 95 % interval by the paired
    bootstrap over test rows: each row's correctness is the mean over seeds, so what another seed
    would give is not in the interval; the spread shows that."""
    ours, theirs = (
        np.array([[int(r) for r in c["right"]] for c in runs]).mean(0) for runs in (cells, base)
    )
    gain = ours - theirs
    rng = np.random.default_rng(0)
    draws = [gain[rng.integers(0, len(gain), len(gain))].mean() for _ in range(10_000)]
    low, high = np.quantile(draws, [0.025, 0.975])
    return f"{gain.mean():+.3f} ({low:+.3f} to {high:+.3f})"
