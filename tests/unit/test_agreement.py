"""How far clients agree: against a sum over pairs of updates."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcfed.importance.agreement import agreement
from hpcfed.policies.layers import agreed


def measured(updates, weights):
    """The agreement of updates (K, L, n) as a run measures it, from norms alone."""
    w = np.asarray(weights) / np.sum(weights)
    mean = np.einsum("k,kln->ln", w, updates)
    return agreement((updates**2).sum(2), np.asarray(weights, float), (mean**2).sum(1))


def pairs(updates, weights):
    """The same, pair by pair."""
    w = np.asarray(weights) / np.sum(weights)
    clients = range(len(w))
    together = sum(
        w[j] * w[k] * (updates[j] * updates[k]).sum(1) for j in clients for k in clients if j != k
    )
    return together / sum(w[k] * (1 - w[k]) * (updates[k] ** 2).sum(1) for k in clients)


@given(st.integers(2, 6), st.integers(1, 4), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_equals_the_sum_over_pairs(clients, layers, seed):
    rng = np.random.default_rng(seed)
    updates = rng.normal(size=(clients, layers, 5)) * rng.uniform(0.1, 10, (clients, 1, 1))
    weights = rng.integers(1, 40, clients)
    assert measured(updates, weights) == pytest.approx(pairs(updates, weights), abs=1e-9)


def test_the_same_updates_agree_and_independent_ones_do_not():
    rng = np.random.default_rng(1)
    same = np.repeat(rng.normal(size=(1, 2, 9)), 5, 0)
    weights = [1, 30, 2, 8, 5]
    assert measured(same, weights) == pytest.approx([1, 1])
    # Whatever the weights and norms: on average over draws.
    drawn = rng.normal(size=(4000, 5, 1, 9)) * np.array([1, 9, 2, 1, 4]).reshape(5, 1, 1)
    assert np.mean([measured(own, weights) for own in drawn]) == pytest.approx(0, abs=0.01)
    against = np.stack([same[0], -same[0]])
    assert measured(against, [3, 3]) == pytest.approx([-1, -1])


def test_equal_weights_have_the_short_form():
    updates = np.random.default_rng(2).normal(size=(5, 3, 7)) + 0.3
    r = (updates.mean(0) ** 2).sum(1) / (updates**2).sum(2).mean(0)
    assert measured(updates, [6] * 5) == pytest.approx((r - 1 / 5) / (1 - 1 / 5))


def test_clients_that_failed_count_for_nothing():
    updates = np.random.default_rng(3).normal(size=(4, 2, 7))
    updates[2] = 0
    assert measured(updates, [3, 5, 0, 4]) == pytest.approx(measured(updates[[0, 1, 3]], [3, 5, 4]))
    assert agreement(np.ones((3, 2)), np.array([0.0, 7.0, 0.0]), np.ones(2)) is None
    still = agreement(np.zeros((3, 2)), np.ones(3), np.zeros(2))
    assert still is not None and not still.any()


def test_layers_are_shared_where_clients_agree():
    assert agreed([0.3, 0.0], 0.1, 0.5) == 1
    assert agreed([0.1, 0.1], 0.1, 0.5) == 0.5
