"""FibecFed equals a plain loop over clients and samples; and only what it shares travels."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hpcfed.importance.spectrum import Spectrum, plateau
from hpcfed.resolve import resolve
from tests import models
from tests.mpi.reference_fibecfed import Reference
from tests.mpi.variants import FIBECFED, write_data
from tests.mpi.worlds import run_worlds
from tests.support import many_runs, mpiexec

# (slots, ranks per client) -> ZeRO stages; where difficulties come from, if not from training; or
# FibecFed on deep prompts
WORLDS = {
    (1, 1): ["zero0", "zero2", "zero0 first_use", "zero0 start", "zero0 prefix"],
    (2, 1): ["zero0"],
    (4, 1): ["zero0"],
    (1, 2): ["zero1", "zero3", "zero3 prefix"],
    (2, 2): ["zero1"],
}


def overrides(out, case):
    stage, when = case.split() if " " in case else (case, "training")
    prefix = []
    if when == "prefix":
        when, prefix = "training", [
            "adapter.kind=prefix", "adapter.virtual_tokens=4", f"model.name={out}/bert",
            "local.lr=1",
        ]  # fmt: skip
    rest = [
        f"deepspeed=ds_configs/{stage}.json", f"data.root={out}", f"curriculum.when={when}",
        f"curriculum.refresh={when != 'start'}",
    ]  # fmt: skip
    return [*FIBECFED, *rest, *prefix]


def kind(case):
    return case.partition(" ")[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """World -> folder with its runs."""

    def save_model(out):
        models.save("bert", out / "bert", initializer_range=0.2)

    return run_worlds(tmp_path_factory, WORLDS, overrides, "fibecfed", save_model)


@pytest.fixture(scope="module")
def references(results):
    """Where difficulties come from -> the plain loop, and what it came to."""
    found = {}
    for case in ("zero0", "zero0 first_use", "zero0 start", "zero0 prefix"):
        loop = Reference(resolve("fibecfed", overrides(results[1, 1], case)).config)
        found[kind(case)] = loop, loop.run()
    return found


def history(run):
    """(round from 0, client) -> the line a client noted."""
    found = {}
    for file in run.glob("clients/*/history.jsonl"):
        for line in map(json.loads, file.read_text().splitlines()):
            found[line["round"] - 1, int(file.parent.name)] = line
    return found


CASES = [(world, stage) for world, stages in WORLDS.items() for stage in stages]


@pytest.mark.parametrize(("world", "stage"), CASES, ids=str)
def test_equals_the_plain_loop(results, references, world, stage):
    own, wanted = references[kind(stage)]
    run = results[world] / stage
    # Decisions first: the same layers, batches and masks.
    selection = json.loads((run / "selection.json").read_text())
    assert selection["shared_layers"] == wanted.layers
    assert 1 < len(wanted.layers) < len(own.layout.layers)
    lines = history(run)
    assert {key: line["trained"] for key, line in lines.items()} == wanted.trained
    for key, difficulty in wanted.difficulty.items():
        noted = lines[key]["difficulty"].items()
        found = {int(row): np.inf if value is None else value for row, value in noted}
        assert found == pytest.approx(difficulty, rel=1e-3)
    masks = {}
    for file in results[world].glob(f"{stage}-masks-*.npz"):
        masks |= dict(np.load(file))
    assert masks.keys() == {f"{number}-{k}" for number, k in wanted.masks}
    for (number, k), mask in wanted.masks.items():
        assert np.array_equal(masks[f"{number}-{k}"], mask.numpy()), (number, k)
    # Then the values.
    start = wanted.initial.numpy()
    values = np.load(results[world] / f"{stage}.npy")
    layout = own.layout
    for block in layout.blocks:
        check(values, wanted.shared.numpy(), start, layout.span(block), f"shared {block}")
    for k, reference_values in wanted.personal.items():
        (file,) = run.glob(f"clients/{k:06d}/personal-*.safetensors")
        personal = values.copy()
        stay = [block for block in layout.layers if block not in wanted.layers]
        packed, at = load_file(file)["values"].numpy(), 0
        for span in layout.spans(stay):
            personal[span] = packed[at : at + span.stop - span.start]
            at += span.stop - span.start
            check(personal, reference_values.numpy(), start, span, f"client {k}")


def check(values, reference, start, span, what):
    """||D - Dref|| / ||Dref|| <= 1e-5, D the way from the initial values."""
    moved, wanted = values[span] - start[span], reference[span] - start[span]
    assert np.linalg.norm(wanted) > 1e-3, f"{what} did not move: the test shows nothing"
    difference = np.linalg.norm(moved - wanted) / np.linalg.norm(wanted)
    assert difference <= 1e-5, f"{what}: {difference:.2e}"


@pytest.mark.parametrize("when", ["", "first_use", "start", "prefix"])
def test_the_case_is_a_real_one(references, when):
    """Masks were in force, orders differ from the batches' own, and some batches were left out."""
    _, wanted = references[when]
    assert sum(not mask.all() for mask in wanted.masks.values()) >= 3
    assert any(used != sorted(used) for used in wanted.trained.values())
    assert len({len(used) for used in wanted.trained.values()}) > 2


def test_bit_identical_for_any_number_of_slots(results):
    runs = [results[slots, 1] / "zero0" for slots in (1, 2, 4)]
    values = [np.load(run.with_suffix(".npy")) for run in runs]
    assert all(np.array_equal(values[0], other) for other in values[1:])
    assert any(runs[0].glob("clients/*/personal-*"))
    files = [{p.relative_to(run): p.read_bytes() for p in run.glob("clients/*/*")} for run in runs]
    assert files[0].keys() == files[1].keys() == files[2].keys()
    assert files[0] == files[1] == files[2]
    assert metrics(runs[0]) == metrics(runs[1]) == metrics(runs[2])


def test_bit_identical_for_two_slots_of_two_ranks(results):
    one, two = (np.load(results[world] / "zero1.npy") for world in ((1, 2), (2, 2)))
    assert np.array_equal(one, two)
    assert metrics(results[1, 2] / "zero1") == metrics(results[2, 2] / "zero1")


def metrics(run):
    """metrics.jsonl without what depends on the number of slots."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["seconds"], line["bytes"]["wire"]
    return lines


@pytest.mark.parametrize("case", ["zero0", "zero0 first_use", "zero0 start", "zero0 prefix"])
def test_what_was_spent(results, references, case):
    own, wanted = references[kind(case)]
    config, layout = own.config, own.layout
    whole, shared = layout.size, layout.count((*wanted.layers, "head"))
    seen = set()
    for number, line in enumerate(metrics(results[1, 1] / case)):
        assert line["scored"] == wanted.scored[number]
        assert line["samples"] == wanted.samples[number] + wanted.scored[number]
        assert line["steps"] == sum(
            config.local.epochs * len(wanted.trained[number, k]) for k in line["clients"]
        )
        new = set(line["clients"]) - seen
        if number < config.curriculum.warmup:
            up = down = 3 * whole
        else:
            up, down = 3 * shared, 3 * shared + len(new) * (whole - shared)
            seen |= new
        assert (line["values"]["up"], line["values"]["down"]) == (up, down)
        for k, density in line["mask_density"].items():
            mask = wanted.masks[number, int(k)]
            home = layout.pack(mask, [b for b in layout.layers if b not in wanted.layers])
            assert density == pytest.approx(float(home.double().mean()))


def test_lossless_number_of_layers(tmp_path):
    """Both rules, on record with their spectra, the same on 1 and 2 slots; ZeRO-0 takes exact
    Hessian products, ZeRO-2 differences, and they see the same spectrum."""
    write_data(tmp_path)
    folder = models.save("bert", tmp_path / "bert")
    runs = {
        f"{rule}-{stage}": [
            *FIBECFED, f"data.root={tmp_path}", f"model.name={folder}", "federation.rounds=2",
            "layers.keep=lossless", f"layers.rule={rule}", f"deepspeed=ds_configs/{stage}.json",
            "layers.probe_clients=2",
        ]
        for rule in ("eigengap", "plateau") for stage in ("zero0", "zero2")
    }  # fmt: skip
    found = {}
    for slots in (1, 2):
        out = tmp_path / str(slots)
        out.mkdir()
        many_runs(out, slots, 1, runs, preset="fibecfed")
        found[slots] = {name: (out / name / "selection.json").read_text() for name in runs}
        lines = [json.loads(line) for line in (out / "plateau-zero0" / "metrics.jsonl").open()]
        assert lines[0]["scored"] == 0
        # 2 clients, 2 passes for the sensitivity and for each of 50 products, over 4 rows.
        assert lines[1]["scored"] == 2 * (2 * 4 + 50 * 2 * 4)
    assert found[1] == found[2]
    for name, text in found[1].items():
        record = json.loads(text)
        assert len(record["spectra"]) == 2
        shares = [own["share"] for own in record["spectra"].values()]
        assert ("fallback" in record) == (shares == [None, None])
        for own in record["spectra"].values():
            values = (torch.tensor(own[key]).double() for key in ("nodes", "weights"))
            if name.startswith("plateau"):
                assert own["share"] == pytest.approx(plateau(Spectrum(*values)), abs=0.01)
        number = max(1, int(record["share"] * 3 + 0.5))
        assert len(record["shared_layers"]) == number
        for k, own in record["spectra"].items():
            assert sum(own["weights"]) == pytest.approx(1, abs=1e-9)
            exact = json.loads(found[1][name.replace("zero2", "zero0")])["spectra"][k]
            assert own["nodes"][-1] == pytest.approx(exact["nodes"][-1], rel=1e-2)
            assert own["nodes"][0] == pytest.approx(exact["nodes"][0], rel=1e-2, abs=1e-4)


OTHERS = {
    "loss": ["curriculum.difficulty=loss", "curriculum.when=first_use"],
    "loss-training": ["curriculum.difficulty=loss", "curriculum.pace=sqrt"],
    "length": ["curriculum.difficulty=length", "curriculum.pace=exp", "layers.score=first"],
    "rarity": ["curriculum.difficulty=rarity", "layers.score=random"],
    "random": ["curriculum.difficulty=random", "curriculum.warmup=0"],
    "reversed": ["curriculum.difficulty=reversed", "layers.score=last", "sparsity.keep=1"],
    "all": ["curriculum.pace=all", "layers.score=all"],
}


def test_every_other_choice_runs(tmp_path):
    """Parts off and other orders, on a small model; what a run tells about its order holds."""
    write_data(tmp_path)
    folder = models.save("bert", tmp_path / "bert")
    common = [*FIBECFED, f"data.root={tmp_path}", f"model.name={folder}"]
    many_runs(
        tmp_path, 2, 1, {name: [*common, *words] for name, words in OTHERS.items()},
        preset="fibecfed",
    )  # fmt: skip
    for name in OTHERS:
        lines, notes = metrics(tmp_path / name), history(tmp_path / name)
        assert len(lines) == 4 and not any(line["failed"] for line in lines)
        assert bool(notes) == (name != "all")
        for (number, _), note in notes.items():
            count = len(note["batches"])
            assert len(note["trained"]) == max(1, math.ceil(round(note["share"] * count, 9)))
            known = note.get("difficulty")
            assert (known is not None) == (
                number > 0 and name in ("loss", "loss-training", "reversed")
            )
    for note in history(tmp_path / "length").values():
        assert note["mask_density"] == 1 or note["round"] > 2
    with_masks = [n["mask_density"] for n in history(tmp_path / "rarity").values()]
    assert min(with_masks) == pytest.approx(0.5, abs=0.05)
    assert {n["mask_density"] for n in history(tmp_path / "reversed").values()} == {1.0}


def test_what_stays_home_never_travels(tmp_path):
    write_data(tmp_path)
    assert "wire: ok" in mpiexec(4, "wire.py", str(tmp_path))
