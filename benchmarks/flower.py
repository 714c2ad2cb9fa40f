"""A federation in hpcfed and in Flower's simulation, side by side.

    python -m benchmarks.flower [--peer PYTHON] [--repeat N] [--shuffled] [section.key=value ...]

Both run the same model (MiniLM, LoRA, a head), rows, clients, rounds, batches and test split, from
the same values, as two processes of one thread each, and take turns. Per run: seconds from start to
end, seconds of rounds per 1,000 samples without the first round (in which Flower's processes load
what hpcfed's have loaded before), CPU seconds, and the peak memory of all processes (PSS, so shared
pages count once). Then the ratios of the medians. With model.dropout=0 both do the same steps, and
how far the trained values are apart is told, relative to how far they have moved.

Flower needs flwr[simulation] (extra `peers`). --peer: the python that has it, where its pins do not
go together with hpcfed's. --shuffled: Flower's clients meet rows as a DataLoader with shuffle=True
deals them out; else they get hpcfed's batches, of texts of similar length.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from hpcfed import model
from hpcfed.app.run import quiet
from hpcfed.checkpoints import resolve_name
from hpcfed.cluster import launcher
from hpcfed.data.batches import form_batches
from hpcfed.fitting import encode
from hpcfed.objectives import heads
from hpcfed.policies.sampling import sample
from hpcfed.rng import generator
from hpcfed.rounds import preflight
from hpcfed.settings.resolve import Resolved, resolve

ROOT = Path(__file__).resolve().parent.parent
PROCESSES = 2
SETTING = [
    "data.root=../shared/datasets", "task.name=trec", "federation.clients=100",
    "federation.per_round=10", "federation.rounds=6", "local.batch_size=8", "data.validation=0",
    "cluster.threads=1",
]  # fmt: skip
MARK = "HPCFED_MEASURED"  # in the environment of each process of a run


@dataclass
class Watched:
    """What the processes of a run take, looked at every so often; daemons among them too."""

    mark: str
    peak: int = 0  # bytes
    ticks: dict[int, int] = field(default_factory=dict)  # of the CPU, by process
    over: threading.Event = field(default_factory=threading.Event)

    def watch(self) -> None:
        """Until it is over."""
        wanted = f"{MARK}={self.mark}".encode()
        found: dict[int, bool] = {}
        while not self.over.wait(0.2):
            held = 0
            for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
                try:
                    if not found.get(pid):  # a child has its parent's environment until it execs
                        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                        found[pid] = wanted in environment
                    if found[pid]:
                        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
                        line = next(x for x in rollup.splitlines() if x.startswith("Pss:"))
                        held += int(line.split()[1]) * 1024
                        after = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                        self.ticks[pid] = int(after[11]) + int(after[12])
                except (OSError, StopIteration):  # it has ended
                    continue
            self.peak = max(self.peak, held)

    @property
    def cpu(self) -> float:
        """Seconds of CPU."""
        return sum(self.ticks.values()) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Took:
    """What a run took: seconds in all and of the later rounds, samples of all rounds and of those,
    CPU seconds, bytes, and the accuracy on the test split."""

    whole: float
    later: float
    samples: int
    later_samples: int
    cpu: float
    peak: int
    accuracy: float

    @property
    def per_thousand(self) -> float:
        """Seconds of rounds after the first, per 1,000 samples."""
        return self.later / self.later_samples * 1000


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--peer", default=sys.executable)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--shuffled", action="store_true")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    quiet()
    with TemporaryDirectory() as name:
        folder = Path(name)
        given = {word.partition("=")[0]: word for word in [*SETTING, *options.overrides]}
        words = list(given.values())
        resolved = resolve("lora-fedavg", [*words, f"output={folder / 'run'}"])
        job = write_job(resolved, folder, options.shuffled)
        sizes = [sum(map(len, own.values())) for own in job["sizes"]]
        print(
            f"{job['clients']} clients, {len(job['batches'][0])} a round, {job['rounds']} rounds, "
            f"{sum(map(sum, (own for r in job['sizes'] for own in r.values())))} samples, "
            f"{sum(sizes)} steps, {PROCESSES} processes of one thread",
            flush=True,
        )
        print(f"{'':>7} {'whole s':>8} {'s/1000':>7} {'CPU s':>7} {'peak MB':>8} {'accuracy':>9}")
        ours, theirs = [], []
        for number in range(options.repeat):
            run = folder / f"run-{number}"
            ours.append(show("hpcfed", of_hpcfed(words, run)))
            theirs.append(show("Flower", of_flower(options.peer, folder, job)))
            if resolved.config.model.dropout == 0 and not options.shuffled:
                print(f"trained values apart by {apart(folder, run):.1e} of how far they moved")
        print("Flower / hpcfed: " + ", ".join(
            f"{word} {ratio(theirs, ours, name):.2f}" for name, word in
            (("whole", "whole run"), ("per_thousand", "per 1,000 samples"), ("cpu", "CPU"),
             ("peak", "memory"))
        ))  # fmt: skip


def ratio(theirs: list[Took], ours: list[Took], name: str) -> float:
    """Of the medians."""
    one, other = (statistics.median(getattr(t, name) for t in runs) for runs in (theirs, ours))
    return float(one / other)


def show(name: str, took: Took) -> Took:
    """A line of the table."""
    print(
        f"{name:>7} {took.whole:>8.1f} {took.per_thousand:>7.2f} {took.cpu:>7.1f} "
        f"{took.peak / 1e6:>8.0f} {took.accuracy:>9.4f}",
        flush=True,
    )
    return took


def write_job(resolved: Resolved, folder: Path, shuffled: bool) -> dict[str, Any]:
    """The run as Flower's side reads it."""
    config = resolved.config
    checked = preflight.check(resolved, PROCESSES)
    task, clients = checked.task, len(checked.rows)
    tokenizer = model.load_tokenizer(config)
    head = heads.build(config, task, tokenizer)
    tokens, _ = encode(head, (task.train, task.test), tokenizer, config)
    prepared = model.prepare(config, task.labels, tokens.pad_id, {}, head)
    save_file(prepared.adapted.saved(prepared.initial), folder / "start.safetensors")
    save_file(prepared.fresh, folder / "fresh.safetensors")
    batches: list[dict[str, list[list[int]]]] = []
    for number in range(config.federation.rounds):
        batches.append({})
        for k in sample(config.seed, number, clients, config.federation.per_round):
            batches[-1][str(k)] = [
                batch.tolist()
                for epoch in range(config.local.epochs)
                for batch in form_batches(
                    checked.rows[k].train, tokens.lengths, config.local.batch_size,
                    generator(config.seed, "batches", number, k, epoch),
                )
            ][: config.local.max_steps]  # fmt: skip
    dropout = config.model.dropout
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    job = {
        "model": str(resolve_name(config.model.name)), "classes": len(task.labels),
        "model_options": {} if dropout is None else dict.fromkeys(names, dropout),
        "rank": config.adapter.rank, "alpha": config.adapter.alpha,
        "targets": sorted(prepared.adapted.description.target_modules),
        "max_length": config.task.max_length,
        "train": {"texts": list(task.train.texts), "labels": task.train.labels.tolist()},
        "test": {"texts": list(task.test.texts), "labels": task.test.labels.tolist()},
        "clients": clients, "rounds": config.federation.rounds, "processes": PROCESSES,
        "batches": batches, "shuffled": shuffled, "batch_size": config.local.batch_size,
        "evaluation_batch_size": config.evaluation.batch_size, "lr": config.local.lr,
        "clip": config.local.clip,
    }  # fmt: skip
    (folder / "job.json").write_text(json.dumps(job))
    return {**job, "sizes": [{k: [len(b) for b in own] for k, own in r.items()} for r in batches]}


def measured(command: list[str], extra: dict[str, str]) -> tuple[float, Watched]:
    """Run it to its end: its seconds, and what it took. Raises RuntimeError if it fails."""
    watched = Watched(str(time.monotonic_ns()))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", MARK: watched.mark, **extra}
    thread = threading.Thread(target=watched.watch)
    thread.start()
    start = time.monotonic()
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    seconds = time.monotonic() - start
    watched.over.set()
    thread.join()
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr)[-6000:])
    return seconds, watched


def of_hpcfed(words: list[str], output: Path) -> Took:
    """The command line, on two ranks."""
    program = [sys.executable, "-m", "hpcfed", "run", "lora-fedavg", *words, f"output={output}"]
    command, extra = launcher.command(launcher.find_mpiexec(), PROCESSES, program)
    seconds, watched = measured(command, {**extra, "PYTHONPATH": str(ROOT)})
    rounds = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((output / "summary.json").read_text())
    first, *later = [(sum(own["seconds"].values()), own["samples"]) for own in rounds]
    return Took(
        seconds, sum(own[0] for own in later), first[1] + sum(own[1] for own in later),
        sum(own[1] for own in later), watched.cpu, watched.peak,
        summary["test"]["personal"]["accuracy"],
    )  # fmt: skip


def of_flower(peer: str, folder: Path, job: dict[str, Any]) -> Took:
    """The app, in Flower's simulation."""
    command = [peer, str(Path(__file__).with_name("flower_app.py")), str(folder)]
    seconds, watched = measured(command, {})
    told = json.loads((folder / "result.json").read_text())
    by_round = [sum(map(sum, own.values())) for own in job["sizes"]]
    assert told["samples"] == sum(by_round)
    return Took(
        seconds, sum(told["seconds"][1:]), sum(by_round), sum(by_round[1:]), watched.cpu,
        watched.peak, told["accuracy"],
    )  # fmt: skip


def apart(folder: Path, run: Path) -> float:
    """||ours - theirs|| / ||ours - start|| of the trained values."""
    start, theirs = (load_file(folder / f"{name}.safetensors") for name in ("start", "end"))
    ours = load_file(run / "adapter" / "adapter_model.safetensors")
    names = sorted(start)
    one, other, before = (
        torch.cat([own[name].double().flatten() for name in names]) for own in (ours, theirs, start)
    )
    return float((one - other).norm() / (one - before).norm())


if __name__ == "__main__":
    main()
