"""Cases: a private run that goes on."""

import json
from pathlib import Path

import pytest

from hpcfed.cluster.topology import Topology
from hpcfed.errors import UserError
from hpcfed.rounds.progress import Progress
from hpcfed.storage.secret import FOLDER
from tests.mpi.cases.runs import build, clear
from tests.support import line


def resume(topology: Topology, folder: Path, words: list[str]) -> None:
    """Two rounds, then two more, against four at once; then the same with a secret key."""

    def run(name: str, rounds: int, goes_on: bool, *more: str) -> Path:
        out = folder / name
        if not goes_on:
            clear(topology, out)
        own = [*words, f"federation.rounds={rounds}", "evaluation.every=9", f"output={out}", *more]
        _, _, *kept = line(["run", "lora-fedavg", *own])
        build(topology, "lora-fedavg", kept, goes_on).run(Progress(speaks=False))
        return out

    def told(out: Path) -> tuple[bytes, list[object]]:
        lines = (out / "metrics.jsonl").read_text().splitlines()
        adapter = (out / "adapter" / "adapter_model.safetensors").read_bytes()
        return adapter, [json.loads(own)["privacy"] for own in lines]

    whole = run("whole", 4, False)
    parts = run("parts", 2, False)
    run("parts", 4, True)
    assert told(parts) == told(whole)
    for own in (folder / FOLDER).glob("*"):
        own.unlink()
    hidden = run("hidden", 2, False, "privacy.secret=true")
    first = told(hidden)
    assert first[0] != told(whole)[0]
    run("hidden", 3, True, "privacy.secret=true")
    assert told(hidden)[1][:2] == first[1]
    (key,) = (folder / FOLDER).iterdir()
    content = key.read_bytes()
    assert not any(content in own.read_bytes() for own in hidden.rglob("*") if own.is_file())
    key.write_bytes(bytes(32))
    with pytest.raises(UserError, match="is not the one that it began with"):
        run("hidden", 4, True, "privacy.secret=true")
    key.unlink()
    with pytest.raises(UserError, match=r"secret key .* cannot be read"):
        run("hidden", 4, True, "privacy.secret=true")
