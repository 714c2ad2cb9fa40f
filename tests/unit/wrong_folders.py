"""Run directories that cannot be resumed: what is wrong with them, how to make them so, and what
hpcfed says.

The folder that is spoiled holds `run`, which was asked to stop after 2 of 5 rounds and whose commit
before the last one is gone; and what it was made from, `data/few` and `data/model`.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hpcfed.storage.commits import FORMAT

Spoil = Callable[[Path], None]
MANIFEST = "run/checkpoint/manifest.json"
TENSORS = "run/checkpoint/round-00002.safetensors"


def written(name: str, content: bytes | str) -> Spoil:
    """Another content."""
    raw = content.encode() if isinstance(content, str) else content

    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(raw)

    return spoil


def replaced(name: str, old: str, new: str) -> Spoil:
    """Another text in a file."""

    def spoil(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text, (name, old)
        (folder / name).write_text(text.replace(old, new, 1))

    return spoil


def removed(name: str) -> Spoil:
    """A file that is not there."""
    return lambda folder: (folder / name).unlink()


def cut(name: str, part: float = 0.5) -> Spoil:
    """A part of a file."""

    def spoil(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * part)])

    return spoil


def flipped(name: str, at: int = -1) -> Spoil:
    """One bit of a byte."""

    def spoil(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[at] ^= 1
        (folder / name).write_bytes(content)

    return spoil


def folder_for(name: str) -> Spoil:
    """A folder where a file should be."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return spoil


def file_for(name: str) -> Spoil:
    """A file where a folder should be."""

    def spoil(folder: Path) -> None:
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).write_text("mine")

    return spoil


def forge(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Another manifest, whose checksum is right."""
    tree = json.loads((folder / MANIFEST).read_text())
    del tree["sha256"]
    change(tree)
    tree["sha256"] = hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(tree))


def forged(path: str, value: Any) -> Spoil:
    """Another value in the manifest, whose checksum is right; GONE: none."""

    def change(tree: dict[str, Any]) -> None:
        *above, last = path.split("/")
        for key in above:
            tree = tree[key]
        if value is GONE:
            del tree[last]
        else:
            tree[last] = value

    return lambda folder: forge(folder, change)


GONE = object()


def also_named(name: str) -> Spoil:
    """Another file that the manifest names."""
    return lambda folder: forge(folder, lambda tree: tree["files"].update({name: "00"}))


def retensored(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Spoil:
    """Other tensors in a commit, whose checksum is right."""

    def spoil(folder: Path) -> None:
        save_file(change(load_file(folder / TENSORS)), folder / TENSORS)
        found = hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest()
        name = TENSORS.removeprefix("run/")
        forge(folder, lambda tree: tree["files"].update({name: found}))

    return spoil


def with_nan(folder: Path) -> None:
    tensors = load_file(folder / TENSORS)
    tensors["values"][0] = float("nan")
    save_file(tensors, folder / TENSORS)


def without(name: str) -> Spoil:
    return retensored(lambda tensors: {k: v for k, v in tensors.items() if k != name})


def also(name: str, tensor: Callable[[], torch.Tensor]) -> Spoil:
    return retensored(lambda tensors: {**tensors, name: tensor()})


def of_client(kind: str, spoil: Callable[[str], Spoil]) -> Spoil:
    """Something done to a client's file that the commit refers to: its first one of this kind."""

    def spoiled(folder: Path) -> None:
        file = sorted((folder / "run/clients").glob(f"*/{kind}-00001.safetensors"))[0]
        spoil(str(file.relative_to(folder)))(folder)

    return spoiled


def history(spoil: Callable[[str], Spoil]) -> Spoil:
    """Something done to the first history."""

    def spoiled(folder: Path) -> None:
        file = sorted((folder / "run/clients").glob("*/history.jsonl"))[0]
        spoil(str(file.relative_to(folder)))(folder)

    return spoiled


def another_clients(name: str) -> Spoil:
    """The file of another client under this one's name."""

    def spoil(folder: Path) -> None:
        file = folder / name
        other = next(o for o in sorted(file.parent.parent.glob(f"*/{file.name}")) if o != file)
        shutil.copy(other, file)

    return spoil


def unsealed(name: str) -> Spoil:
    """The same tensors, written by another program."""
    return lambda folder: save_file(load_file(folder / name), folder / name)


def other_values(name: str) -> Spoil:
    """Other tensors under the old header."""

    def spoil(folder: Path) -> None:
        with safe_open(folder / name, "pt") as file:
            header = file.metadata()
        tensors = load_file(folder / name)
        save_file({k: torch.zeros_like(v) for k, v in tensors.items()}, folder / name, header)

    return spoil


def swapped(name: str) -> Spoil:
    """Two rows of one label change places: all counts are the same."""

    def spoil(folder: Path) -> None:
        lines = (folder / name).read_text().splitlines()
        labels = [json.loads(line)["label"] for line in lines]
        one = next(i for i, label in enumerate(labels) if labels.count(label) > 1)
        two = labels.index(labels[one], one + 1)
        lines[one], lines[two] = lines[two], lines[one]
        (folder / name).write_text("\n".join(lines) + "\n")

    return spoil


def reworded(name: str) -> Spoil:
    """Another text in the first row."""

    def spoil(folder: Path) -> None:
        first, *lines = (folder / name).read_text().splitlines()
        row = json.loads(first)
        row["text"] = "another text of the same label"
        (folder / name).write_text("\n".join([json.dumps(row), *lines]) + "\n")

    return spoil


def other_weights(folder: Path) -> None:
    file = folder / "data/model/model.safetensors"
    tensors = load_file(file)
    name = next(key for key in sorted(tensors) if "embed" in key)
    tensors[name].view(-1)[0] += 1
    save_file(tensors, file, {"format": "pt"})


def other_words(folder: Path) -> None:
    """A tokenizer with two words of its vocabulary swapped."""
    file = folder / "data/model/tokenizer.json"
    tree = json.loads(file.read_text())
    words = tree["model"]["vocab"]
    one, two = "what", "the"
    words[one], words[two] = words[two], words[one]
    file.write_text(json.dumps(tree))


DAMAGED = r"manifest\.json is damaged"
SAFE = r"round-00002\.safetensors"
CHECKSUM = r"is not what was committed \(its checksum differs\)"

# (what is wrong, how to make it so, what hpcfed says)
CASES: list[tuple[str, Spoil, str]] = [
    ("no manifest", removed(MANIFEST), r"manifest\.json is missing"),
    ("an empty manifest", written(MANIFEST, ""), rf"{DAMAGED} \(it is not JSON\)"),
    ("a manifest of bytes", written(MANIFEST, b"\xff\xfe\x00\x80"), rf"{DAMAGED} \(it is not JSON"),
    ("half a manifest", cut(MANIFEST), rf"{DAMAGED} \(it is not JSON"),
    ("a manifest that is a list", written(MANIFEST, "[]"), rf"{DAMAGED} \(it is no JSON object"),
    ("a manifest nested without end", written(MANIFEST, "[" * 200_000), rf"{DAMAGED} \(it is n"),
    ("a manifest of zeros", written(MANIFEST, bytes(600)), rf"{DAMAGED} \(it is not JSON"),
    ("a number of 5,000 digits", replaced(MANIFEST, '"rounds": 2', f'"rounds": {"9" * 5000}'),
     DAMAGED),
    ("a folder for the manifest", folder_for(MANIFEST), r"manifest\.json cannot be read"),
    ("an empty object", written(MANIFEST, "{}"), DAMAGED),
    *[(f"rounds edited to {number}", replaced(MANIFEST, '"rounds": 2', f'"rounds": {number}'),
       rf"{DAMAGED} \(its content is not what its checksum says\)")
      for number in ("3", "0", "-2", "9", '"2"', "true")],
    ("a server rate edited", replaced(MANIFEST, '"server_lr": ', '"server_lr": 1'), DAMAGED),
    ("a checksum edited", replaced(MANIFEST, '"sha256": "', '"sha256": "0'), DAMAGED),
    ("the format of another hpcfed", replaced(MANIFEST, f'"format": {FORMAT}', '"format": 2'),
     rf"manifest\.json is of another hpcfed \(its format is 2, and this hpcfed reads {FORMAT}\)"),
    ("no format", forged("format", GONE), rf"{DAMAGED} \(it has no format"),
    ("a format that is a text", forged("format", "3"), rf"{DAMAGED} \(it has no format"),
    # From here on the manifest's own checksum is right.
    ("rounds below 0", forged("rounds", -1), rf"{DAMAGED} \(rounds is -1, not a whole number"),
    ("rounds as a text", forged("rounds", "2"), rf"{DAMAGED} \(rounds is '2', not a whole"),
    ("rounds with a fraction", forged("rounds", 2.0), rf"{DAMAGED} \(rounds is 2\.0, not a whole"),
    ("rounds true", forged("rounds", True), rf"{DAMAGED} \(rounds is True, not a whole"),
    ("rounds null", forged("rounds", None), rf"{DAMAGED} \(rounds is None"),
    ("more rounds than planned", forged("rounds", 9), rf"{DAMAGED} \(rounds is 9 of 5"),
    ("rounds without their tensors", forged("rounds", 3), rf"{DAMAGED} \(files are not those"),
    ("planned as a list", forged("planned", [5]), rf"{DAMAGED} \(planned is \[5\], not a whole"),
    ("more rounds planned than asked for", forged("planned", 7), r"began with federation\.roun"),
    ("no totals", forged("totals", GONE), rf"{DAMAGED} \(totals is missing"),
    ("totals that are a list", forged("totals", []), rf"{DAMAGED} \(totals is \[\], not keys"),
    ("steps below 0", forged("totals/steps", -1), rf"{DAMAGED} \(totals\.steps is -1"),
    ("no steps", forged("totals/steps", GONE), rf"{DAMAGED} \(totals\.steps is missing"),
    ("an unknown key", forged("clients", {}), rf"{DAMAGED} \(clients does not belong"),
    ("shared blocks as a text", forged("shared_blocks", "head"), r"shared_blocks is 'head', not a"),
    ("shared blocks of numbers", forged("shared_blocks", [1]), r"shared_blocks is 1, not a text"),
    ("shared blocks of another model", forged("shared_blocks", ["99"]), r"is of another adapter"),
    ("a server rate that is null", forged("server_lr", None), r"server_lr is None, not a finite"),
    ("a server rate that is no number", forged("server_lr", float("nan")), r"server_lr is nan"),
    ("a server rate without end", forged("server_lr", float("inf")), r"server_lr is inf"),
    ("a best round to come", forged("best/round", 7), rf"{DAMAGED} \(best\.round is none"),
    ("a best round as a text", forged("best", "2"), rf"{DAMAGED} \(best is '2', not keys"),
    ("a best round without a score", forged("best/score", GONE), r"best\.score is missing"),
    ("no best round, but its values", forged("best", None), r"round-00002.* holds 'best', which"),
    ("no seconds of training", forged("seconds/phases/train", GONE), r"seconds\.phases are not"),
    ("seconds as a text", forged("seconds/total", "8"), r"seconds\.total is '8', not a finite"),
    ("phases as a list", forged("seconds/phases", []), r"seconds\.phases is \[\], not a mapping"),
    ("metrics of -5 bytes", forged("metrics/bytes", -5), r"metrics\.bytes is -5"),
    ("metrics of 10 GB", forged("metrics/bytes", 10**10), r"metrics\.jsonl is shorter"),
    ("metrics of 2**70 bytes", forged("metrics/bytes", 2**70), r"metrics\.bytes is 118"),
    ("another checksum of metrics", forged("metrics/sha256", "00"), rf"metrics\.jsonl {CHECKSUM}"),
    ("no files", forged("files", {}), r"files are not those of a commit"),
    ("files as a list", forged("files", ["partition.json"]), r"files is \['partition.*not a map"),
    ("a file outside", also_named("../../etc/passwd"), r"files are not those of a commit"),
    ("a file that is none of a commit", also_named("config.yaml"), r"files are not those of a com"),
    ("another checksum of the tensors", forged("files", {TENSORS[4:]: "00", "partition.json": "0"}),
     r"is not what was committed"),
    ("another run's name", forged("run", "0123456789abcdef"), r"belongs to another client"),
    ("a name that is null", forged("run", None), r"run is None, not a text"),
    ("began with other data", forged("began/data", "00"), r"data are not those"),
    ("began with other tokens", forged("began/tokens", "00"), r"The tokenizer makes other tokens"),
    ("began with another model", forged("began/model", "00"), r"The model's weights are not those"),
    ("began with another configuration", forged("began/configuration", "00"),
     r"config\.yaml has been changed since"),
    ("began with another DeepSpeed JSON", forged("began/deepspeed", "00"), r"DeepSpeed JSON has"),
    ("began with what is a number", forged("began/model", 7), r"began\.model is 7, not a text"),
    # The commit's tensors.
    ("no tensors", removed(TENSORS), r"round-00002\.safetensors is missing"),
    ("empty tensors", written(TENSORS, ""), f"{SAFE} {CHECKSUM}"),
    ("half the tensors", cut(TENSORS), f"{SAFE} {CHECKSUM}"),
    ("a flipped last bit of the tensors", flipped(TENSORS), f"{SAFE} {CHECKSUM}"),
    ("a flipped bit in their header", flipped(TENSORS, 20), f"{SAFE} {CHECKSUM}"),
    ("a value that is NaN", with_nan, f"{SAFE} {CHECKSUM}"),
    ("a folder for the tensors", folder_for(TENSORS), r"round-00002\.safetensors cannot be read"),
    # Their checksum is right.
    ("no values", without("values"), r"round-00002\.safetensors holds no 'values'"),
    ("no best values", without("best"), r"holds no 'best'"),
    ("values of another type", retensored(lambda t: {**t, "values": t["values"].double()}),
     r"holds 'values' as torch\.float64"),
    ("values of two dimensions", retensored(lambda t: {**t, "values": t["values"][None]}),
     r"holds 'values' as torch\.float32 \(1, "),
    ("values without end", retensored(lambda t: {**t, "values": t["values"] / 0}),
     r"holds values in 'values' that are not finite"),
    ("best values of another length", retensored(lambda t: {**t, "best": t["best"][:-1].clone()}),
     r"holds 'best' as"),
    ("a server's vector of another length", also("server.momentum", lambda: torch.zeros(3)),
     r"holds 'server\.momentum' as torch\.float32 \(3,\)"),
    ("all values of another length",
     retensored(lambda t: {k: v[:3].clone() if v.dim() == 1 else v for k, v in t.items()}),
     r"is of another adapter"),
    ("a tensor that does not belong there", also("more", lambda: torch.zeros(1)),
     r"holds 'more', which does not belong there"),
    ("a kind of client file that is not one", also("clients.x.current", lambda: torch.zeros(1)),
     r"holds 'clients\.x\.current', which does not"),
    ("a client's round to come", also("clients.personal.current", lambda: torch.tensor([[0, 7]])),
     r"holds rounds in 'clients\.personal\.current' that were not committed"),
    ("a client twice", also("clients.personal.current", lambda: torch.tensor([[0, 0], [0, 1]])),
     r"holds a client twice in clients\.personal\.current"),
    ("clients as fractions", also("clients.personal.current", lambda: torch.tensor([[0.5, 1.0]])),
     r"holds 'clients\.personal\.current' as torch\.float32"),
    ("a client without its file", also("clients.personal.current", lambda: torch.tensor([[9, 1]])),
     r"000009/personal-00001\.safetensors is missing"),
    # What else a commit names.
    ("no metrics", removed("run/metrics.jsonl"), r"metrics\.jsonl is missing"),
    ("metrics cut off", cut("run/metrics.jsonl"), r"metrics\.jsonl is shorter"),
    ("empty metrics", written("run/metrics.jsonl", ""), r"metrics\.jsonl is shorter"),
    ("a changed figure in the metrics", flipped("run/metrics.jsonl", 30),
     rf"metrics\.jsonl {CHECKSUM}"),
    ("a folder for the metrics", folder_for("run/metrics.jsonl"), r"metrics\.jsonl is a folder"),
    ("no partition", removed("run/partition.json"), r"partition\.json is missing"),
    ("a partition that is no JSON", written("run/partition.json", "{"), r"tion\.json is damaged"),
    ("a partition that is a list", written("run/partition.json", "[]"), r"tion\.json is damaged"),
    ("a changed partition", replaced("run/partition.json", "0", "1"), r"partition\.json"),
    ("no selection", removed("run/selection.json"), r"selection\.json is missing"),
    ("a changed selection", flipped("run/selection.json", 5), rf"selection\.json {CHECKSUM}"),
    # What a run knows of itself.
    ("no configuration", removed("run/config.yaml"), r"it has no config\.yaml"),
    ("a configuration that is no YAML", written("run/config.yaml", "a: ["), r"config\.yaml is dam"),
    ("a configuration of bytes", written("run/config.yaml", b"\xff\xfe"), r"yaml is damaged"),
    ("a configuration that is a list", written("run/config.yaml", "- 1\n"), r"config\.yaml is dam"),
    ("another seed in the configuration", replaced("run/config.yaml", "seed: 352", "seed: 353"),
     r"began with seed=353, not 352"),
    ("rounds as a text in the configuration",
     replaced("run/config.yaml", "rounds: 5", "rounds: many"), r"with federation\.rounds=many"),
    ("no run.json", removed("run/run.json"), r"run\.json is missing"),
    ("a run.json that is no JSON", written("run/run.json", "lives"), r"run\.json is damaged"),
    ("a run.json that is a list", written("run/run.json", "[]"), r"run\.json is damaged"),
    ("lives as a text", written("run/run.json", '{"lives": "x"}'), r"run\.json is damaged \(it li"),
    ("a folder for run.json", folder_for("run/run.json"), r"run\.json is a folder"),
    # What clients keep.
    *[(f"a client's file of {kind}: {what}", of_client(kind, spoil),
       rf"{kind}-00001\.safetensors {s}")
      for kind, what, spoil, s in (
          ("personal", "none", removed, "is missing"),
          ("personal", "empty", lambda name: written(name, ""), "is damaged"),
          ("personal", "half of it", cut, "is damaged"),
          ("personal", "a text", lambda name: written(name, "mine"), "is damaged"),
          ("personal", "a flipped last bit", flipped, r"is damaged \(its content is not what"),
          ("curriculum", "a flipped last bit", flipped, r"is damaged \(its content is not what"),
          ("moments", "a flipped last bit", flipped, r"is damaged \(its content is not what"),
          ("control", "a flipped last bit", flipped, r"is damaged \(its content is not what"),
          ("personal", "a flipped bit in its header", lambda name: flipped(name, 12), "is damaged"),
          ("personal", "another client's", another_clients, "belongs to another client"),
          ("personal", "another program's", unsealed, "is damaged"),
          ("moments", "other values", other_values, r"is damaged \(its content is not what"),
          ("personal", "a folder", folder_for, "cannot be read"),
      )],
    ("a history with a line that is none",
     history(lambda name: written(name, "{}\nx\n")), r"history\.jsonl is damaged in line 1"),
    ("a history of bytes", history(lambda name: written(name, b"\xff\n")), r"jsonl is damaged"),
    ("a history that goes back",
     history(lambda name: written(name, '{"round": 2}\n{"round": 1}\n')),
     r"history\.jsonl is damaged in line 2"),
    ("a folder for a history", history(folder_for), r"history\.jsonl cannot be read"),
    ("a file for clients", file_for("run/clients"), r"clients is a file, where a folder"),
    ("a file for a client's folder", file_for("run/clients/000999"), r"000999 is a file"),
    # What is in the way of what will be written.
    ("a file for the checkpoint", file_for("run/checkpoint"), r"checkpoint is a file"),
    ("a file for the adapter", file_for("run/adapter"), r"adapter is a file, where a folder"),
    ("a folder for the predictions", folder_for("run/predictions.json"), r"predictions\.json is a"),
    ("a folder for the summary", folder_for("run/summary.json"), r"summary\.json is a fold"),
    ("a folder for the lock", folder_for("run/lock"), r"lock is a folder, where a file"),
    # What it was made from.
    ("other texts in the training rows", reworded("data/few/train.jsonl"), r"data are not those"),
    ("two training rows swapped", swapped("data/few/train.jsonl"), r"data are not those"),
    ("other texts in the test rows", reworded("data/few/test.jsonl"), r"data are not those"),
    ("two test rows swapped", swapped("data/few/test.jsonl"), r"data are not those"),
    ("a row fewer", cut("data/few/train.jsonl", 0.97), r"line \d+: not valid JSON"),
    ("other weights at the same place", other_weights, r"The model's weights are not those"),
    ("another tokenizer at the same place", other_words, r"The tokenizer makes other tokens"),
]  # fmt: skip

NAMES = [name for name, _, _ in CASES]
assert len(set(NAMES)) == len(NAMES)
assert all(re.compile(said) for _, _, said in CASES)
