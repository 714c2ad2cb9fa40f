"""Whether two run directories hold the same result, bit for bit."""

import json

import torch
from safetensors.torch import load, load_file


def metrics(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["seconds"], line["bytes"]["wire"]  # the wire depends on the slots
    return lines


def tensors(out):
    """File -> its tensors, the whole run directory's."""
    files = sorted(out.rglob("*.safetensors"))
    return {str(file.relative_to(out)): load_file(file) for file in files}


def kept(out):
    """File -> content, of all that clients keep. The header of a file of tensors names its run, so
    that of these it is the tensors."""
    found = {}
    for file in sorted(out.glob("clients/*/*")):
        content = file.read_bytes()
        if file.suffix == ".safetensors":
            content = {name: value.numpy().tobytes() for name, value in load(content).items()}
        found[str(file.relative_to(out))] = content
    return found


def assert_same(one, two):
    """Two run directories tell the same in the same files, but for seconds and machines."""
    assert metrics(one) == metrics(two)
    rounds = json.loads((one / "summary.json").read_text())["rounds"]
    assert [line["round"] for line in metrics(one)] == list(range(1, rounds + 1))
    first, second = tensors(one), tensors(two)
    assert first.keys() == second.keys() and len(first) > 2
    for file, values in first.items():
        assert values.keys() == second[file].keys()
        for name, value in values.items():
            assert torch.equal(value, second[file][name]), f"{file}: {name}"
    for name in ("predictions.json", "selection.json", "partition.json"):
        if name != "selection.json" or (one / name).exists():  # of methods that choose layers
            assert (one / name).read_text() == (two / name).read_text(), name
    summaries = [json.loads((out / "summary.json").read_text()) for out in (one, two)]
    for summary in summaries:
        del summary["seconds"], summary["bytes"]["wire"]
    assert summaries[0] == summaries[1]
    files = [sorted(str(p.relative_to(out)) for p in out.rglob("*")) for out in (one, two)]
    assert files[0] == files[1]
    for history in one.rglob("history.jsonl"):
        assert history.read_text() == (two / history.relative_to(one)).read_text()
