"""FibecFed equals a plain loop over clients and samples; and only what it shares travels."""

import json
import math
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hpcfed.importance.spectrum import Spectrum, plateau
from hpcfed.settings.resolve import resolve
from tests.mpi.reference_fibecfed import Reference
from tests.mpi.variants import FIBECFED
from tests.pairwise import each, others
from tests.same import kept, metrics
from tests.support import latest

# What differs between cases: where difficulties come from, if not from training; deep prompts.
KINDS = {
    "": [],
    "first_use": ["curriculum.when=first_use"],
    "start": ["curriculum.when=start", "curriculum.refresh=false"],
    "prefix": ["adapter.kind=prefix", "adapter.virtual_tokens=4", "local.lr=1"],
}
FACTORS: dict[str, list[Any]] = {
    "shape": [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)],
    "stage": ["zero0", "zero1", "zero2", "zero3", "offload"],
    "kind": list(KINDS),
}
# Four ranks meet in test_equivalence, and below.
FEW = each({**FACTORS, "shape": [(1, 1), (2, 1), (1, 2)]})
MANY = others(FACTORS, FEW)


def overrides(out, kind="", stage="zero0"):
    return [
        *FIBECFED, f"data.root={out}", f"model.name={out}/bert-classifier",
        f"deepspeed=ds_configs/{stage}.json", "local.lr=0.1", *KINDS[kind],
    ]  # fmt: skip


def federate(worlds, shape, tmp_path, words, name="run", preset="fibecfed"):
    """A run: what rank 0 has of it, with every slot's masks, and its directory."""
    ranks = worlds.call(
        shape, "tests.mpi.cases.runs:federate", folder=tmp_path, runs={name: words}, preset=preset
    )
    found = ranks[0][name]
    for other in ranks[1:]:
        found["masks"] |= other[name].get("masks", {})
    return found, tmp_path / name


@pytest.fixture
def reference(data, once):
    """reference(kind): layout, configuration and what the plain loop came to."""

    def get(kind, words=None):
        def make():
            loop = Reference(resolve("fibecfed", words or overrides(data, kind)).config)
            return loop.layout, loop.config, loop.run()

        return once(f"fibecfed-{kind}", make)

    return get


def history(run):
    """(round from 0, client) -> the line a client noted."""
    found = {}
    for file in run.glob("clients/*/history.jsonl"):
        for line in map(json.loads, file.read_text().splitlines()):
            found[line["round"] - 1, int(file.parent.name)] = line
    return found


def compare(found, run, layout, wanted):
    """A run with the plain loop. Decisions first: the same layers, batches and masks."""
    selection = json.loads((run / "selection.json").read_text())
    assert selection["shared_layers"] == wanted.layers
    assert 1 < len(wanted.layers) < len(layout.layers)
    lines = history(run)
    assert {key: line["trained"] for key, line in lines.items()} == wanted.trained
    for key, difficulty in wanted.difficulty.items():
        noted = lines[key]["difficulty"].items()
        known = {int(row): np.inf if value is None else value for row, value in noted}
        assert known == pytest.approx(difficulty, rel=1e-3)
    assert found["masks"].keys() == wanted.masks.keys()
    for key, mask in wanted.masks.items():
        assert np.array_equal(found["masks"][key], mask.numpy()), key
    # Then the values.
    start = wanted.initial.numpy()
    values = found["values"]
    for block in layout.blocks:
        check(values, wanted.shared.numpy(), start, layout.span(block), f"shared {block}")
    for k, reference_values in wanted.personal.items():
        (file,) = latest(run.glob(f"clients/{k:06d}/personal-*.safetensors"))
        stay = layout.part(layout.layers) - layout.part(wanted.layers)
        personal = torch.from_numpy(values.copy())
        stay.unpack(load_file(file)["values"], personal)
        for span in stay.slices:
            check(personal.numpy(), reference_values.numpy(), start, span, f"client {k}")
    assert sum(not mask.all() for mask in wanted.masks.values()) >= 3, "no mask was in force"
    assert any(used != sorted(used) for used in wanted.trained.values()), "no other order"
    assert len({len(used) for used in wanted.trained.values()}) > 2, "no batches were left out"


def check(values, reference, start, span, what):
    """||D - Dref|| / ||Dref|| <= 1e-5, D the way from the initial values."""
    moved, wanted = values[span] - start[span], reference[span] - start[span]
    assert np.linalg.norm(wanted) > 1e-3, f"{what} did not move: the test shows nothing"
    difference = np.linalg.norm(moved - wanted) / np.linalg.norm(wanted)
    assert difference <= 1e-5, f"{what}: {difference:.2e}"


@pytest.mark.parametrize(("shape", "stage", "kind"), FEW)
def test_equals_the_plain_loop(worlds, reference, data, tmp_path, shape, stage, kind):
    layout, config, wanted = reference(kind)
    found, run = federate(worlds, shape, tmp_path, overrides(data, kind, stage))
    compare(found, run, layout, wanted)
    check_spending(run, layout, config, wanted)


@pytest.mark.long
@pytest.mark.parametrize(("shape", "stage", "kind"), MANY)
def test_equals_the_plain_loop_in_full(worlds, reference, data, tmp_path, shape, stage, kind):
    layout, _, wanted = reference(kind)
    found, run = federate(worlds, shape, tmp_path, overrides(data, kind, stage))
    compare(found, run, layout, wanted)


@pytest.mark.parametrize("shape", [(2, 1)])
def test_a_real_model(worlds, reference, data, tmp_path, shape):
    """MiniLM, at ZeRO-1."""
    words = [*FIBECFED, f"data.root={data}", "deepspeed=ds_configs/zero1.json"]
    layout, _, wanted = reference("minilm", words)
    found, run = federate(worlds, shape, tmp_path, words)
    compare(found, run, layout, wanted)


def check_spending(run, layout, config, wanted):
    """What the run says that it has cost."""
    whole, shared = layout.size, layout.part((*wanted.layers, "head")).size
    seen: set[int] = set()
    for number, line in enumerate(metrics(run)):
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
            home = (layout.part(layout.layers) - layout.part(wanted.layers)).pack(mask)
            assert density == pytest.approx(float(home.double().mean()))


@pytest.mark.parametrize(
    ("shape", "stage"), [((1, 1), "zero0"), ((2, 1), "zero0"),
                         pytest.param((4, 1), "zero0", marks=pytest.mark.long),
                         pytest.param((1, 2), "zero1", marks=pytest.mark.long),
                         pytest.param((2, 2), "zero1", marks=pytest.mark.long)],
)  # fmt: skip
def test_bit_identical_for_any_number_of_slots(worlds, data, once, tmp_path, shape, stage):
    """Each compares with the first that ran, of as many ranks per client."""
    found, run = federate(worlds, shape, tmp_path, overrides(data, "", stage))
    files = kept(run)
    assert any("personal-" in name for name in files)
    now = (found["values"], files, metrics(run))
    first = once(f"fibecfed-bits-{shape[1]}", lambda: now)
    assert np.array_equal(now[0], first[0])
    assert now[1:] == first[1:]


LOSSLESS = [("eigengap", "zero0"), ("plateau", "zero0"), ("plateau", "zero2")]


@pytest.mark.parametrize(
    ("shape", "cases"),
    [((1, 1), LOSSLESS), pytest.param((2, 1), [("plateau", "zero0")], marks=pytest.mark.long)],
)
def test_lossless_number_of_layers(worlds, data, once, tmp_path, shape, cases):
    """Both rules, on record with their spectra, the same on 1 and 2 slots; ZeRO-0 takes exact
    Hessian products, ZeRO-2 differences, and they see the same spectrum."""
    texts = {}
    for rule, stage in cases:
        words = [
            *overrides(data, "", stage), "federation.rounds=2", "layers.keep=lossless",
            f"layers.rule={rule}", "layers.probe_clients=2",
        ]  # fmt: skip
        _, run = federate(worlds, shape, tmp_path, words, f"{rule}-{stage}")
        texts[rule, stage] = (run / "selection.json").read_text()
        lines = metrics(run)
        assert lines[0]["scored"] == 0
        if rule == "plateau":
            # 2 clients, 2 passes for the sensitivity and for each of 50 products, over 4 rows.
            assert lines[1]["scored"] == 2 * (2 * 4 + 50 * 2 * 4)
    for case, text in texts.items():
        name = "-".join(("fibecfed-lossless", *case))
        assert text == once(name, lambda text=text: text), "another number of slots"
    for (rule, _), text in texts.items():
        record, exact = json.loads(text), json.loads(texts[rule, "zero0"])
        assert len(record["spectra"]) == 2
        shares = [own["share"] for own in record["spectra"].values()]
        assert ("fallback" in record) == (shares == [None, None])
        number = max(1, int(record["share"] * 3 + 0.5))
        assert len(record["shared_layers"]) == number
        for k, own in record["spectra"].items():
            values = (torch.tensor(own[key]).double() for key in ("nodes", "weights"))
            if rule == "plateau":
                assert own["share"] == pytest.approx(plateau(Spectrum(*values)), abs=0.01)
            assert sum(own["weights"]) == pytest.approx(1, abs=1e-9)
            nodes, others = own["nodes"], exact["spectra"][k]["nodes"]
            assert nodes[-1] == pytest.approx(others[-1], rel=1e-2)
            assert nodes[0] == pytest.approx(others[0], rel=1e-2, abs=1e-4)


OTHERS = {
    "loss": ["curriculum.difficulty=loss", "curriculum.when=first_use"],
    "loss-training": ["curriculum.difficulty=loss", "curriculum.pace=sqrt"],
    "length": ["curriculum.difficulty=length", "curriculum.pace=exp", "layers.score=first"],
    "rarity": ["curriculum.difficulty=rarity", "layers.score=random"],
    "random": ["curriculum.difficulty=random", "curriculum.warmup=0"],
    "reversed": ["curriculum.difficulty=reversed", "layers.score=last", "sparsity.keep=1"],
    "all": ["curriculum.pace=all", "layers.score=all"],
}


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("loss", "reversed", "all") else pytest.param(name, marks=pytest.mark.long)
        for name in OTHERS
    ],
)
@pytest.mark.parametrize("shape", [(1, 1)])
def test_every_other_choice_runs(worlds, data, tmp_path, shape, name):
    """Parts off and other orders; what a run tells about its order and its masks holds."""
    words = [*overrides(data), *OTHERS[name]]
    _, run = federate(worlds, shape, tmp_path, words)
    lines, notes = metrics(run), history(run)
    assert len(lines) == 4 and not any(line["failed"] for line in lines)
    assert bool(notes) == (name != "all")
    warm = resolve("fibecfed", words).config.curriculum.warmup
    densities = defaultdict(list)
    for (number, client), note in sorted(notes.items()):
        count = len(note["batches"])
        assert len(note["trained"]) == max(1, math.ceil(round(note["share"] * count, 9)))
        known = note.get("difficulty")
        assert (known is not None) == (number > 0 and name in ("loss", "loss-training", "reversed"))
        if number < warm:
            assert note["mask_density"] == 1
        else:
            densities[client].append(note["mask_density"])
    for first, *later in densities.values():
        assert first == 1, "a client's first round has no mask"
        if name == "reversed":  # sparsity is off
            assert later == [1] * len(later)
        else:
            assert later == pytest.approx([0.5] * len(later), abs=0.06)
    assert name == "all" or max(map(len, densities.values())) > 1, "no client came twice"


@pytest.mark.parametrize("shape", [(4, 1)])
@pytest.mark.parametrize("name", [pytest.param("plain", marks=pytest.mark.long), "control"])
def test_what_stays_home_never_travels(worlds, data, tmp_path, shape, name):
    worlds.call(shape, "tests.mpi.cases.wire:check", out=tmp_path, data=data, method=name)


@pytest.mark.parametrize("shape", [(2, 1)])
@pytest.mark.parametrize("form", ["array", "bytes", "float", "tensor", "pickled", "nested"])
def test_the_watch_sees_a_leak_in_any_form(worlds, shape, form):
    worlds.call(shape, "tests.mpi.cases.wire:check_watch", form=form)
