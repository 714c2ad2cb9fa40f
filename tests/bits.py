"""Small runs of every preset, and whether two sets of them have the same bits.

    python -m tests.bits run FOLDER             one run of every preset
    python -m tests.bits compare ONE OTHER      exit code 1, and where, if they differ

A change that leaves the numerics alone is made between two calls of `run`. Compared are adapter,
metrics and predictions, and what clients keep; not seconds, nor how a commit is laid out. Runs
that only one of the two has are named. Noise of privacy is drawn from the seed, since a secret is
another each time; `attempt` starts from prompts that a run of prompt-tuning has left.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.models import save
from tests.support import latest, line

# What every run has in common; the model is small, and each client has a dozen rows.
COMMON = [
    "task.max_length=32", "task.max_train=60", "data.validation=0.2", "federation.clients=4",
    "federation.per_round=3", "local.batch_size=4", "evaluation.every=2", "cluster.threads=1",
    "adapter.virtual_tokens=4", "layers.probe_clients=2", "seed=352",
]  # fmt: skip
GAP = [
    "task.template='{a} <mask>'",
    "task.verbalizer={person: who, place: where, number: many, time: when, reason: why}",
]
# Runs beside the presets themselves: what is only there with ranks of one client, or sharded.
SHAPES = {
    "fibecfed-zero3": (
        "fibecfed",
        ["cluster.ranks_per_client=2", "deepspeed=ds_configs/zero3.json"],
    ),
    "fedpeptao-zero2": (
        "fedpeptao",
        ["cluster.ranks_per_client=2", "deepspeed=ds_configs/zero2.json"],
    ),
    "fibecfed-lossless": ("fibecfed", ["layers.keep=lossless", "layers.rule=plateau"]),
    "fedpeptao-lora": (
        "fedpeptao",
        ["adapter.kind=lora", "sparsity.keep=0.5", "curriculum.pace=linear"],
    ),
}
SETTINGS = ("demo", "instruct-demo")
SOURCE = "prompt-tuning"  # whose prompts `attempt` starts from


def main() -> int:
    """The command line."""
    if sys.argv[1:2] == ["run"] and len(sys.argv) == 3:
        return run(Path(sys.argv[2]))
    if sys.argv[1:2] == ["compare"] and len(sys.argv) == 4:
        return compare(Path(sys.argv[2]), Path(sys.argv[3]))
    print(__doc__)
    return 2


def run(folder: Path) -> int:
    """Run everything into `folder`, which must be new."""
    folder.mkdir(parents=True)
    for head in ("classifier", "cloze"):
        save("bert", folder / "models" / head, head, initializer_range=0.2)
    listed = subprocess.run(
        [sys.executable, "-m", "hpcfed", "presets"], capture_output=True, text=True, check=True
    )
    names = [line.split()[0] for line in listed.stdout.splitlines()]
    runs = {name: (name, list[str]()) for name in names if name not in SETTINGS}
    if "attempt" in runs:  # last, when its source is there
        runs["attempt"] = (runs.pop("attempt")[0], [f"adapter.sources=[{folder / SOURCE}]"])
    for name, (preset, extra) in {**runs, **SHAPES}.items():
        tree = subprocess.run(
            [sys.executable, "-m", "hpcfed", "config", preset],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        cloze = "head: cloze" in tree
        if "\n  secret: true" in tree and preset.startswith("dp-"):
            extra = [*extra, "privacy.secret=false"]
        warm = int(tree.partition("warmup: ")[2].split()[0])
        words = [
            preset, *COMMON, *(GAP if cloze else []), *extra, f"federation.rounds={3 + warm}",
            f"model.name={folder}/models/{'cloze' if cloze else 'classifier'}",
            f"output={folder / name}",
        ]  # fmt: skip
        ranks = 2 if "cluster.ranks_per_client=2" in extra else 1
        subprocess.run(
            [sys.executable, "-m", "hpcfed", *line(["run", *words, f"--ranks={ranks}"])],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        print(f"{name}: done", flush=True)
    return 0


def compare(one: Path, other: Path) -> int:
    """Print whether each run is the same in both folders."""
    first, second = (
        {p.name for p in folder.iterdir() if (p / "summary.json").exists()}
        for folder in (one, other)
    )
    assert first & second
    for name in sorted(first ^ second):
        print(f"{name}: only in {one if name in first else other}")
    bad = 0
    for name in sorted(first & second):
        where = differences(one / name, other / name)
        bad += bool(where)
        print(f"{name}: {'; '.join(where) or 'the same bits'}")
    return 1 if bad else 0


def differences(one: Path, other: Path) -> list[str]:
    """In what two runs differ."""
    where = []
    if metrics(one) != metrics(other):
        where.append("metrics.jsonl")
    for name in (
        "predictions.json",
        "selection.json",
        "partition.json",
        "adapter/adapter_config.json",
    ):
        first, second = (own / name for own in (one, other))
        if first.exists() != second.exists() or (
            first.exists() and _text(first, one) != _text(second, other)
        ):
            where.append(name)
    first_states, second_states = tensors(one), tensors(other)
    if first_states.keys() != second_states.keys():
        where.append(f"files {first_states.keys() ^ second_states.keys()}")
        return where
    for file, values in first_states.items():
        if values.keys() != second_states[file].keys() or not all(
            torch.equal(value, second_states[file][key]) for key, value in values.items()
        ):
            where.append(file)
    for history in one.glob("clients/*/history.jsonl"):
        if history.read_text() != (other / history.relative_to(one)).read_text():
            where.append(str(history.relative_to(one)))
    return where


def _text(file: Path, run: Path) -> str:
    text = file.read_text().replace(str(run.parent), "")
    if file.name == "adapter_config.json":  # PEFT writes sets in any order
        return json.dumps(
            {k: sorted(v) if isinstance(v, list) else v for k, v in json.loads(text).items()}
        )
    return text


def metrics(run: Path) -> list[dict[str, object]]:
    """metrics.jsonl without seconds."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def tensors(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    """File -> tensors of the adapter and of what clients keep; control variates packed, since they
    were once kept so: the shared values alone, the others being zero."""
    counts = json.loads((run / "run.json").read_text())["adapter_values"]
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    shared = [block in (*last["shared_layers"], "head") for block in counts]
    mask = torch.repeat_interleave(torch.tensor(shared), torch.tensor(list(counts.values())))
    found = {}
    for file in sorted(
        [*run.glob("adapter/*.safetensors"), *latest(run.glob("clients/*/*.safetensors"))]
    ):
        values = load_file(file)
        if file.name.startswith("control-") and len(values["control"]) == len(mask):
            assert not values["control"][~mask].any()
            values["control"] = values["control"][mask]
        found[str(file.relative_to(run))] = values
    return found


if __name__ == "__main__":
    sys.exit(main())
