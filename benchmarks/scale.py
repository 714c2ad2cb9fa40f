"""What many clients and many rounds cost: memory, open files, CPU seconds, the run directory.

    python -m benchmarks.scale clients [METHOD ...]    100, 1,000 and 10,000 clients, 20 a round
    python -m benchmarks.scale rounds [METHOD ...]     1,000 rounds of 4 clients, watched every 100

A model of a few thousand values, made on the spot; one rank. Ratios are to the first line of each
table. Each run is a process of its own, watched from outside through /proc: CPU seconds, so that
other work on the machine changes little.
"""

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.models import save

METHODS = ("lora-fedavg", "fibecfed", "scaffold")
COMMON = [
    "task.name=many", "task.max_length=16", "local.epochs=1",
    "local.batch_size=4", "data.validation=0", "data.partition.kind=iid", "cluster.threads=1",
]  # fmt: skip


def write_rows(folder: Path, rows: int) -> None:
    """folder/many with so many short rows of two classes."""
    (folder / "many").mkdir()
    words = ("good", "bad")
    lines = [
        json.dumps({"text": f"{words[i % 2]} {i % 97}", "label": words[i % 2]}) for i in range(rows)
    ]
    (folder / "many" / "train.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "many" / "test.jsonl").write_text("\n".join(lines[:20]) + "\n")


def watch(words: list[str], out: Path) -> list[dict[str, Any]]:
    """Run, and note memory (MB), open files and CPU seconds whenever ten more rounds are there."""
    line = [sys.executable, "-m", "hpcfed", "run", *words, f"output={out}"]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL)
    seen: list[dict[str, Any]] = []
    proc = Path("/proc") / str(process.pid)
    while process.poll() is None:
        time.sleep(0.1)
        metrics = out / "metrics.jsonl"
        rounds = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        if rounds // 10 > (seen[-1]["rounds"] // 10 if seen else 0):
            try:
                memory = int((proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
                files = len(list((proc / "fd").iterdir()))
                ticks = (proc / "stat").read_text().rpartition(")")[2].split()[11:13]
            except OSError:
                break
            cpu = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
            seen.append({"rounds": rounds, "memory": memory / 1e6, "files": files, "cpu": cpu})
    if process.wait():
        sys.exit(f"{' '.join(line)} ended with code {process.returncode}")
    return seen


def each(earlier: dict[str, Any], later: dict[str, Any]) -> float:
    """CPU seconds a round between two notes."""
    return float((later["cpu"] - earlier["cpu"]) / (later["rounds"] - earlier["rounds"]))


def size(out: Path) -> tuple[int, float, float]:
    """Files, MB, and KB of the manifest of a run directory."""
    files = [path for path in out.rglob("*") if path.is_file()]
    manifest = (out / "checkpoint" / "manifest.json").stat().st_size
    return len(files), sum(path.stat().st_size for path in files) / 1e6, manifest / 1e3


def clients(folder: Path, model: Path, methods: Sequence[str]) -> None:
    """The same rounds with more and more clients."""
    print("method        clients  start s  round s  ratio  peak MB  ratio  files  manifest KB")
    for method in methods:
        base: tuple[float, float] | None = None
        for count in (100, 1000, 10000):
            out = folder / f"{method}-{count}"
            root = folder / f"data-{count}"
            if not root.exists():
                root.mkdir()
                write_rows(root, 4 * count)
            seen = watch(
                [method, *COMMON, f"data.root={root}", f"model.name={model}",
                 f"federation.clients={count}", "federation.per_round=20", "federation.rounds=60",
                 "evaluation.every=1000", "evaluation.clients=50"],
                out,
            )  # fmt: skip
            first, last = (next(n for n in seen if n["rounds"] >= at) for at in (10, 50))
            cost, peak = each(first, last), max(note["memory"] for note in seen)
            start = first["cpu"] - first["rounds"] * cost
            base = base or (cost, peak)
            number, _, manifest = size(out)
            print(
                f"{method:<12} {count:8d} {start:8.1f} {cost:8.3f} "
                f"{cost / base[0]:6.2f} {peak:8.0f} {peak / base[1]:6.2f} {number:6d} "
                f"{manifest:8.1f}",
                flush=True,
            )


def rounds(folder: Path, model: Path, methods: Sequence[str]) -> None:
    """A thousand rounds."""
    print("method        rounds  round s  ratio  MB now  ratio  open files  directory MB")
    root = folder / "data"
    root.mkdir()
    write_rows(root, 400)
    for method in methods:
        out = folder / method
        seen = watch(
            [method, *COMMON, f"data.root={root}", f"model.name={model}", "federation.clients=100",
             "federation.per_round=4", "federation.rounds=1000", "evaluation.every=1000"],
            out,
        )  # fmt: skip
        marks = [
            next(note for note in seen if note["rounds"] >= at) for at in range(100, 1000, 100)
        ]
        first = each(marks[0], marks[1])
        for earlier, mark in itertools.pairwise(marks):
            cost = each(earlier, mark)
            print(
                f"{method:<12} {mark['rounds']:7d} {cost:8.4f} {cost / first:6.2f} "
                f"{mark['memory']:7.0f} {mark['memory'] / marks[0]['memory']:6.2f} "
                f"{mark['files']:10d}",
                flush=True,
            )
        print(f"{'':<12} {1000:7d} {'':43} {size(out)[1]:10.1f}", flush=True)


def main() -> None:
    """Measure what is asked for."""
    what = {"clients": clients, "rounds": rounds}[sys.argv[1]]
    with TemporaryDirectory() as place:
        folder = Path(place)
        what(folder, save("bert", folder / "model"), sys.argv[2:] or METHODS)


if __name__ == "__main__":
    main()
