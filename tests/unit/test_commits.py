"""A state comes back from what a commit writes."""

import json

import pytest
import torch
from safetensors.torch import load, save

from hpcfed.state import Best, ClientFiles, RunState, Seconds, ServerState, Totals
from hpcfed.storage.commits import FORMAT, decode, encode


def state():
    values = torch.arange(5.0)
    return RunState(
        values=values,
        chosen=("1", "head"),
        server=ServerState(0.25, {"momentum": values * 2, "control": values * 3}),
        rounds=7,
        best=Best(4, 0.5, values),
        clients={"personal": ClientFiles({3: 6, 5: 1}, {3: 4}), "moments": ClientFiles()},
        totals=Totals(samples=9, wire=1),
        seconds=Seconds(init=1.5, total=8.0, tail=None),
    )


def through_a_file(given):
    tensors, content = encode(given)
    return decode(load(save(tensors)), json.loads(json.dumps(content)))


def test_everything_comes_back():
    given, found = state(), through_a_file(state())
    assert torch.equal(found.values, given.values)
    assert found.best is not None and torch.equal(found.best.values, given.values)
    assert found.server.vectors.keys() == given.server.vectors.keys()
    for name, vector in found.server.vectors.items():
        assert torch.equal(vector, given.server.vectors[name])
    for name in ("chosen", "rounds", "clients", "totals", "seconds"):
        assert getattr(given, name) == getattr(found, name), name
    assert (found.server.lr, found.best.round, found.best.score) == (0.25, 4, 0.5)
    assert set(vars(given)) == {
        "values", "best", "server", "chosen", "rounds", "clients", "totals", "seconds",
    }, "a part of the state that this test does not know"  # fmt: skip


def test_before_there_is_a_best_round():
    given = state()
    given.best = None
    assert through_a_file(given).best is None


def test_another_format_is_refused():
    tensors, content = encode(state())
    with pytest.raises(ValueError, match=f"its format is 1, and this hpcfed reads {FORMAT}"):
        decode(tensors, {**content, "format": 1})
    del content["clients"]
    with pytest.raises(KeyError):
        decode(tensors, content)
