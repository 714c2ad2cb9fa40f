"""The number of shared layers by how far clients agree: against a plain loop, on any number of
slots, and over lives."""

import json

import numpy as np
import pytest

from hpcfed.policies.sampling import sample
from hpcfed.settings.resolve import resolve
from tests.mpi.reference_fibecfed import Reference
from tests.mpi.test_fibecfed import federate, overrides
from tests.same import kept, metrics

AGREEING = ["layers.keep=lossless", "layers.rule=agreement"]
# What a run with this threshold must come to, bit for bit.
ENDS = {"half": (0.99, "layers.keep=0.5"), "whole": (-1.0, "layers.keep=1")}


@pytest.fixture
def agreement(data, once):
    """How far clients agree on each layer in the warm-up round, pair by pair, in a plain loop."""

    def make():
        loop = Reference(resolve("fibecfed", overrides(data)).config)
        start, config = loop.found.initial.clone(), loop.config
        clients = sample(config.seed, 0, len(loop.rows), config.federation.per_round)
        ways = {k: (loop.client(k, 0, start) - start).double() for k in clients}
        rows = {k: len(loop.rows[k].train) for k in clients}
        weight = {k: rows[k] / sum(rows.values()) for k in clients}
        found = {}
        for layer in loop.layout.layers:
            own = {k: way[loop.layout.span(layer)] for k, way in ways.items()}
            together = sum(
                weight[j] * weight[k] * float(own[j] @ own[k])
                for j in clients for k in clients if j != k
            )  # fmt: skip
            apart = sum(weight[k] * (1 - weight[k]) * float(own[k] @ own[k]) for k in clients)
            found[layer] = together / apart
        return found

    return once("agreement", make)


def record(run):
    return json.loads((run / "selection.json").read_text())


@pytest.mark.parametrize("shape", [(2, 1), (1, 2)])
@pytest.mark.parametrize("name", ENDS)
def test_layers_are_shared_where_clients_agree(
    worlds, data, agreement, once, tmp_path, shape, name
):
    """As far as the plain loop says, and then as a run to which that share was given."""
    threshold, share = ENDS[name]
    words = [*overrides(data), *AGREEING, f"layers.agree={threshold}"]
    found, run = federate(worlds, shape, tmp_path, words, "agreeing")
    told, mine = metrics(run), record(run)
    assert mine["agreement"] == pytest.approx(agreement, rel=1e-3, abs=1e-5)
    assert max(mine["agreement"].values()) > 0.05, "a test of noise"
    given, other = federate(worlds, shape, tmp_path, [*overrides(data), share], "given")
    assert record(other)["shared_layers"] == mine["shared_layers"]
    assert np.array_equal(found["values"], given["values"])
    assert (kept(run), told) == (kept(other), metrics(other))
    assert once(f"agreement-{shape[1]}", lambda: mine["agreement"]) == mine["agreement"]


@pytest.mark.parametrize("shape", [(1, 1), (2, 1)])
def test_any_number_of_slots_agrees_on_it(worlds, data, once, tmp_path, shape):
    words = [*overrides(data), *AGREEING, "federation.rounds=2"]
    _, run = federate(worlds, shape, tmp_path, words)
    assert once("agreement-slots", lambda: record(run)) == record(run)


@pytest.mark.parametrize("shape", [(1, 1)])
def test_struck_before_the_layers_are_chosen(worlds, data, tmp_path, shape):
    """What clients agreed on is in the commit of the last warm-up round."""
    words = [*overrides(data), *AGREEING, "layers.agree=0.99", "evaluation.every=2"]
    (struck,) = worlds.call(
        shape, "tests.mpi.cases.resume:check", preset="fibecfed", words=words, folder=tmp_path,
        times=1, only=["select", "commit", "sweep"],
    )  # fmt: skip
    assert struck["select"] == 1 and "agreement" in record(tmp_path / "struck")


@pytest.mark.parametrize("shape", [(1, 1)])
def test_one_client_agrees_with_nobody(worlds, data, tmp_path, shape):
    """All but one of the warm-up's updates are lost: a fixed share, which says so."""
    config = resolve("fibecfed", overrides(data)).config
    first = sample(config.seed, 0, 4, config.federation.per_round)
    words = [*overrides(data), *AGREEING, "federation.rounds=2"]
    worlds.call(
        shape, "tests.mpi.cases.runs:federate", folder=tmp_path, runs={"run": words},
        preset="fibecfed", lost=tuple((0, k) for k in first[1:]),
    )  # fmt: skip
    told = record(tmp_path / "run")
    assert "fewer than two" in told["fallback"] and len(told["shared_layers"]) == 2
