"""Layers that stay home, averaged every so many rounds: against a plain loop, and over lives."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hpcfed.settings.resolve import resolve
from tests.mpi.reference_fibecfed import Reference
from tests.mpi.test_fibecfed import compare, federate, overrides
from tests.same import kept, metrics
from tests.support import latest

# Two clients of four a round. With this seed client 3 comes first in round 4, after the first
# average, of round 3; the last one is of round 5.
SYNC = ["federation.per_round=2", "federation.rounds=6", "seed=358", "layers.sync_every=2"]
AVERAGED, NEWCOMERS = (3, 5), {2: 2, 3: 1, 4: 1}


@pytest.fixture
def reference(data, once):
    def make():
        loop = Reference(resolve("fibecfed", [*overrides(data), *SYNC]).config)
        return loop.layout, loop.run()

    return once("sync", make)


@pytest.mark.parametrize(
    ("shape", "stage"), [((1, 1), "zero0"), ((2, 1), "zero0"), ((1, 2), "zero2")]
)
def test_equals_the_plain_loop(worlds, reference, data, once, tmp_path, shape, stage):
    """The values, the same bits on any number of slots, and the bytes."""
    layout, wanted = reference
    found, run = federate(worlds, shape, tmp_path, [*overrides(data, "", stage), *SYNC])
    compare(found, run, layout, wanted)
    whole, shared = layout.size, layout.part((*wanted.layers, "head")).size
    stay = [layer for layer in layout.layers if layer not in wanted.layers]
    for line in metrics(run):
        number = line["round"]
        synced = number in AVERAGED
        assert line.get("synced_layers") == (stay if synced else None)
        sent = whole if number == 1 or synced else shared
        new = NEWCOMERS.get(number, 0) * (whole - shared)
        got = 2 * (whole if number == 1 else shared) + new
        assert (line["values"]["up"], line["values"]["down"]) == (2 * sent, got)
        assert line["bytes"]["up"] == 8 * sent
    now = (found["values"], kept(run), metrics(run))
    first = once(f"sync-bits-{shape[1]}", lambda: now)
    assert np.array_equal(now[0], first[0]) and now[1:] == first[1:]


@pytest.mark.parametrize("shape", [(2, 1)])
def test_behind_control_variates(worlds, data, tmp_path, shape):
    """What else travels does not get into it: it is the mean of what the clients have kept."""
    words = [
        *overrides(data), *SYNC, "federation.rounds=3", "server.optimizer=momentum",
        "server.control=true", "data.validation=0.2",
    ]  # fmt: skip
    found, run = federate(worlds, shape, tmp_path, words)
    layout = Reference(resolve("fibecfed", overrides(data)).config).layout
    chosen = json.loads((run / "selection.json").read_text())["shared_layers"]
    stay = layout.part(layout.layers) - layout.part(chosen)
    classes = json.loads((run / "partition.json").read_text())["train"]
    total, weight = torch.zeros(stay.size, dtype=torch.float64), 0
    for k in metrics(run)[-1]["clients"]:
        (file,) = latest(run.glob(f"clients/{k:06d}/personal-*.safetensors"))
        total += sum(classes[k]) * load_file(file)["values"].double()
        weight += sum(classes[k])
    mean = (total / weight).float()
    assert torch.equal(stay.pack(torch.from_numpy(found["values"])), mean)


@pytest.mark.parametrize("shape", [(1, 1)])
def test_goes_on(worlds, data, tmp_path, shape):
    """Struck before, in and after a round in which they are averaged."""
    (struck,) = worlds.call(
        shape, "tests.mpi.cases.resume:check", preset="fibecfed",
        words=[*overrides(data), *SYNC, "evaluation.every=2"], folder=tmp_path, times=5,
        only=["exchange", "commit", "sweep"],
    )  # fmt: skip
    assert set(struck.values()) == {5}
