"""Cases: a private run that goes on."""

import json
from pathlib import Path

import pytest

from hpcfed.app.plan import plan
from hpcfed.cluster.topology import Topology
from hpcfed.errors import UserError
from hpcfed.privacy.accountant import epsilon
from hpcfed.rounds.progress import Progress
from hpcfed.settings.resolve import resolve
from hpcfed.storage.secret import FOLDER
from tests.mpi.cases.runs import build, clear, command_line
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


def budget(topology: Topology, folder: Path, words: list[str]) -> None:
    """Noise 0.7, one of four clients a round, and what three rounds cost, of four planned."""
    allowed = 0.5 * (epsilon(0.25, 0.7, 3, 1e-5) + epsilon(0.25, 0.7, 4, 1e-5))
    limited = [*words, f"privacy.epsilon={allowed}", "evaluation.every=9"]
    out, other = folder / "budget", folder / "three"
    for folder in (out, other):
        clear(topology, folder)
    said = f"privacy.epsilon={allowed:g} allows 3 of the 4 rounds"
    own = [*limited, "federation.rounds=4"]
    code, text, _ = command_line(topology, ["run", "lora-fedavg", *own, f"output={out}"])
    assert code == 0
    short = [*words, "evaluation.every=9", "federation.rounds=3", f"output={other}"]
    assert command_line(topology, ["run", "lora-fedavg", *short])[0] == 0
    if topology.is_root:
        assert text.count(said) == 2 and "round   3/3" in text
        _, source, *kept = line(["run", "lora-fedavg", *own])
        assert any(told.startswith(said) for told in plan(resolve(source, kept), 1, 2, 80.0))
        summary = json.loads((out / "summary.json").read_text())
        assert summary["rounds"] == 3 and summary["privacy"]["epsilon"] <= allowed
        assert summary["privacy"]["budget"] == allowed
        assert summary["privacy"]["ended_early"].startswith(said)
        lines = [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]
        assert len(lines) == 3 and "validation" not in lines[-1]  # there are no rows for it
        assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == (
            other / "adapter" / "adapter_model.safetensors"
        ).read_bytes()
    for rounds in (4, 9):
        own = [*limited, f"federation.rounds={rounds}", f"output={out}", "--resume"]
        code, text, _ = command_line(topology, ["run", "lora-fedavg", *own])
        assert code == 0 and (not topology.is_root or "is complete" in text)
