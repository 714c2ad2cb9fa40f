"""A method of one's own: what docs/add-a-method.md shows runs as it stands there."""

import json
import re

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from hpcfed.app.cli import main
from hpcfed.rng import generator
from tests import documented
from tests.mpi.variants import COMMON, federate
from tests.same import metrics

RUNS = "tests.mpi.cases.runs"
LIMIT = 5.0  # the page's


def words(data, *extra):
    return [
        *COMMON, "local.lr=0.02", "local.batch_size=4", f"data.root={data}",
        f"model.name={data}/bert-classifier", *extra,
    ]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    return documented.write(tmp_path)


def command(worlds, shape, line, code=0):
    """`hpcfed LINE` on all ranks; what they printed."""
    ranks = worlds.call(shape, f"{RUNS}:command_line", words=list(map(str, line)))
    printed = "".join(output + problem for _, output, problem in ranks)
    assert [own for own, _, _ in ranks] == [code] * len(ranks), printed
    return printed


@pytest.mark.parametrize("shape", [(1, 1), (2, 1)])
def test_what_is_personal_stays_home(worlds, data, once, folder, shape):
    out = folder / "run"
    command(worlds, shape, ["run", folder / "mine.yaml", *words(data), f"output={out}"])
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    shared, personal = (
        sum(v.numel() for n, v in adapter.items() if f"lora_{role}" in n) for role in "AB"
    )
    head = json.loads((out / "run.json").read_text())["adapter_values"]["head"]
    shared += head
    for line in metrics(out):
        assert line["values"] == {"up": 3 * shared, "down": 3 * shared, "head": head}
        assert line["failed"] == {} and line["shared_layers"] == ["0", "1", "2"]
    for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()):
        small = 1 + 3 * 7 + 2 * 2 + 2  # the weight, and the statistics
        wire = (shared + small) * 16 + shared * 4 if shape == (2, 1) else 0
        assert line["bytes"]["wire"] == wire
    for name, value in adapter.items():
        if "lora_B" in name:
            assert not value.any(), "B has reached the server"
    files = {p.name[:4]: load_file(p) for p in sorted(out.glob("clients/*/*.safetensors"))}
    assert files["pers"]["values"].shape == (personal,) and files["pers"]["values"].any()
    assert files["upda"]["rest"].shape == (shared,)
    told = once("own-method", lambda: (metrics(out), adapter))
    assert metrics(out) == told[0]
    assert all(torch.equal(value, told[1][name]) for name, value in adapter.items())


@pytest.mark.parametrize("shape", [(1, 1)])
def test_an_update_is_clipped_and_the_rest_kept(worlds, data, folder, shape):
    """One client in one round: what is sent and what is kept are one update, cut at the limit."""
    runs = {"run": words(data, "federation.per_round=1", "federation.rounds=1", "local.lr=0.2")}
    found = worlds.call(
        shape, f"{RUNS}:federate", folder=folder, runs=runs, preset=str(folder / "mine.yaml")
    )[0]["run"]
    sent = found["values"] - found["initial"]
    (memo,) = (folder / "run").glob("clients/*/updates-00000.safetensors")
    rest = load_file(memo)["rest"].numpy()
    assert np.linalg.norm(rest) > 0.1, "nothing was cut off: the test shows nothing"
    assert np.linalg.norm(sent) == pytest.approx(LIMIT, rel=1e-4)
    ratio = np.linalg.norm(rest) / LIMIT
    assert np.allclose(sent[sent != 0] * ratio, rest[rest != 0], atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1)])
def test_it_goes_on_with_the_same_bits(worlds, data, folder, shape):
    own = ["layers.score=last", "layers.keep=0.67", "data.validation=0.2", "local.lr=0.1"]
    (struck,) = worlds.call(
        shape, "tests.mpi.cases.resume:check", preset=str(folder / "mine.yaml"),
        words=words(data, *own), folder=folder, times=1, only=["commit", "exchange"],
    )  # fmt: skip
    assert struck == {"commit": 1, "exchange": 1}
    assert len(list(folder.glob("struck/clients/*/updates-*"))) >= 3


@pytest.mark.parametrize("shape", [(2, 1)])
def test_a_plugin_that_has_changed(worlds, data, folder, shape):
    """A run is not resumed with it, complete or not; put back, it goes on."""
    out, plugin = folder / "run", folder / "my_method.py"
    line = ["run", folder / "mine.yaml", *words(data, "federation.rounds=1"), f"output={out}"]
    command(worlds, shape, line)
    text = plugin.read_text()
    said = f"hpcfed: The plug-in {plugin} has changed since the run in {out} began; put it back,"
    plugin.write_text(text.replace("LIMIT = 5.0", "LIMIT = 6.0"))
    assert command(worlds, shape, [*line, "--resume"], code=2).count(said) == 1
    (out / "summary.json").unlink()
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert command(worlds, shape, [*line, "--resume"], code=2).count(said) == 1
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    plugin.write_text(text)
    command(worlds, shape, [*line, "--resume"])
    assert (out / "summary.json").exists()


@pytest.mark.parametrize("shape", [(2, 1)])
def test_the_parts_of_the_reference(worlds, data, folder, shape):
    """All in one run: layers in turns, noise on the mean, steps of the server's rate."""
    rate, rounds = 0.01, 3
    names = [name for name in documented.files() if re.fullmatch(r"my_\w+\.py", name)]
    (folder / "all.yaml").write_text(
        f"base: lora-fedavg\nplugins: [{', '.join(names)}]\nsharing: {{rule: turns}}\n"
        f"updates: {{transforms: [noise]}}\nserver: {{optimizer: lion, lr: {rate}}}\n"
        "curriculum: {difficulty: distinct, pace: linear}\n"
        "layers: {score: gradient, keep: 0.67}\nmodel: {head: smoothed}\n"
    )
    found = worlds.call(
        shape, f"{RUNS}:federate", folder=folder, runs={"run": words(data)},
        preset=str(folder / "all.yaml"),
    )[0]["run"]  # fmt: skip
    out = folder / "run"
    selection = json.loads((out / "selection.json").read_text())
    scores = selection["scores"]
    assert selection["shared_layers"] == sorted(sorted(scores, key=scores.get)[1:])
    assert len(set(scores.values())) == 3 and min(scores.values()) > 0
    for number, line in enumerate(metrics(out)):
        turn = [own for own in selection["shared_layers"] if int(own) % 2 == number % 2]
        assert line["shared_layers"] == turn and line["failed"] == {}
    steps = (found["values"] - found["initial"]) / rate
    assert np.allclose(steps, steps.round(), atol=1e-3)
    assert set(np.abs(steps.round())) == {0, 1, 2, 3}, "the head moves in all, layers in their turn"
    assert rounds == len(metrics(out))
    history = next((out / "clients").glob("*/history.jsonl")).read_text().splitlines()
    assert json.loads(history[0])["trained"]


@pytest.mark.parametrize("shape", [(1, 1)])
def test_what_a_transform_makes_of_the_mean(worlds, data, folder, shape):
    """my_noise.py: a run's values are those of one without it and the noise, drawn by hand."""
    (folder / "noise.yaml").write_text(
        "base: lora-fedavg\nplugins: [my_noise.py]\nupdates: {transforms: [noise]}\n"
    )
    own = words(data, "federation.rounds=1")
    found = {
        preset: federate(worlds, shape, folder / "runs" / str(turn), own, preset)[0]["values"]
        for turn, preset in enumerate(("lora-fedavg", str(folder / "noise.yaml")))
    }
    plain, noisy = found.values()
    drawn = generator(352, "my noise", 0).normal(0.0, 1e-4, len(plain))
    assert np.allclose(noisy - plain, drawn, rtol=0, atol=1e-7)


@pytest.mark.parametrize("shape", [(1, 1)])
def test_the_page_without_its_transform_is_fedsa_lora(worlds, data, folder, shape):
    one, first = federate(
        worlds, shape, folder / "one", words(data, "updates.transforms=[]"),
        str(folder / "mine.yaml"),
    )  # fmt: skip
    two, second = federate(worlds, shape, folder / "two", words(data), "fedsa-lora")
    assert np.array_equal(one["values"], two["values"]) and metrics(first) == metrics(second)


@pytest.mark.parametrize("shape", [(1, 1)])
def test_an_adapter_of_ones_own(worlds, data, folder, shape, monkeypatch, capsys):
    """my_adapter.py: only biases train; it is exported, and the card does not promise PEFT. With
    the plug-in changed, nothing is exported."""
    (folder / "bitfit.yaml").write_text(
        "base: lora-fedavg\nplugins: [my_adapter.py]\nadapter: {kind: bitfit}\n"
    )
    _, out = federate(worlds, shape, folder, words(data), str(folder / "bitfit.yaml"))
    tensors = load_file(out / "adapter" / "adapter_model.safetensors")
    biases = {name for name in tensors if not name.startswith("classifier.")}
    base = load_file(data / "bert-classifier" / "model.safetensors")
    base = {f"bert.{name.removeprefix('bert.')}": value for name, value in base.items()}
    wanted = {n for n in base if re.fullmatch(r"bert\.encoder\.layer\.\d.*\.bias", n)}
    assert biases == wanted and len(wanted) == 3 * 8
    assert all(not torch.equal(tensors[name], base[name]) for name in wanted)
    monkeypatch.chdir(folder)
    assert main(["export", str(out), "--to", str(folder / "out")]) == 0
    card = (folder / "out" / "README.md").read_text()
    assert "whoever has the plug-in that registers `bitfit`" in card and "PeftModel" not in card
    assert main(["predict", str(folder / "out"), "x.csv"]) == 2
    assert "load it as its README.md says" in capsys.readouterr().err
    plugin = folder / "my_adapter.py"
    plugin.write_text(plugin.read_text() + "\n")
    assert main(["export", str(out), "--to", str(folder / "again")]) == 2
    assert "my_adapter.py has changed since the run" in capsys.readouterr().err
    assert not (folder / "again").exists()


@pytest.mark.parametrize("shape", [(1, 1)])
def test_from_python(worlds, data, folder, shape):
    """try_it.py, on small data."""
    pairs = (word.split("=", 1) for word in words(data, "federation.rounds=1"))
    small = {key: yaml.safe_load(value) for key, value in pairs}
    (printed,) = worlds.call(
        shape, "tests.mpi.cases.api:script", file=folder / "try_it.py", overrides=small
    )
    lines = [line for line in printed.splitlines() if "MB sent" in line]
    assert [line.split(":")[0] for line in lines] == ["mine.yaml", "fedsa-lora"]
    assert (folder / "runs" / "few-mine-352" / "summary.json").exists()
