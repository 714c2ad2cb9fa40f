"""Pace, orders, batches in use; sparsity; layer scores."""

import itertools
import math

import numpy as np
import pytest
import torch

from hpcfed.adapters.layout import HEAD, AdapterLayout
from hpcfed.data.batches import Tokens
from hpcfed.policies import curriculum, layers, sparsity


@pytest.mark.parametrize("pace", ["linear", "sqrt", "exp"])
def test_pace_starts_grows_and_is_full_in_time(pace):
    start, full_at, rounds = 0.3, 0.6, 20
    f = [curriculum.portion(pace, start, full_at, t, rounds) for t in range(rounds)]
    assert f[0] == pytest.approx(start)
    assert all(a < b for a, b in itertools.pairwise(f[:13]))
    assert f[11] < 1 and f[12:] == [1.0] * 8
    x = 5 / 12
    formula = {
        "linear": 0.3 + 0.7 * x,
        "sqrt": math.sqrt(0.09 + 0.91 * x),
        "exp": 0.3 ** (1 - x),
    }
    assert f[5] == pytest.approx(formula[pace])


def test_pace_all_and_a_start_of_one_use_everything():
    assert curriculum.portion("all", 0.1, 0.6, 0, 10) == 1
    for pace in ("linear", "sqrt", "exp"):
        assert curriculum.portion(pace, 1.0, 0.6, 0, 10) == 1


def test_in_use_rounds_up():
    assert curriculum.in_use([4, 2, 0, 1, 3], 0.5) == [4, 2, 0]
    assert curriculum.in_use([1, 0], 0.01) == [1]
    assert curriculum.in_use([0, 1, 2], 1.0) == [0, 1, 2]
    # 0.1 + 0.2 is a little more than 0.3
    assert len(curriculum.in_use(list(range(10)), 0.1 + 0.2)) == 3


def test_texts_grow_and_are_whole_in_time():
    def lengths(cut, shortest):
        return [curriculum.cut_at(cut, shortest, 0.6, t, 10, 64) for t in range(10)]

    assert lengths("linear", 0.125) == [8, 17, 26, 36, 45, 54, 64, 64, 64, 64]
    assert lengths("stage", 0.25) == [16] * 6 + [64] * 4
    assert lengths("none", 0.125) == [64] * 10
    assert curriculum.cut_at("stage", 0.01, 1.0, 9, 10, 64) == curriculum.SHORTEST


def tokens_of(texts):
    lengths = [len(text) for text in texts]
    ids = np.concatenate([np.array(text, dtype=np.int32) for text in texts])
    labels = np.zeros(len(texts), dtype=np.int64)
    return Tokens(ids, None, np.concatenate([[0], np.cumsum(lengths)]), labels, 0)


def test_orders_that_need_no_model():
    tokens = tokens_of([[5, 5, 5, 5], [5, 9], [8], [7, 7, 7]])
    rows = np.array([0, 1, 3])
    assert curriculum.length(rows, tokens).tolist() == [4, 2, 3]
    # Of 9 tokens in these rows 5 are "5", one "9", three "7"; row 2 is another client's.
    rarity = curriculum.rarity(rows, tokens)
    assert rarity == pytest.approx(
        [-math.log(5 / 9), -(math.log(5 / 9) + math.log(1 / 9)) / 2, -math.log(3 / 9)]
    )


def test_batches_are_ordered_by_the_sum_over_their_samples():
    batches = [np.array([0, 1]), np.array([2]), np.array([3, 4])]
    difficulty = np.array([1.0, 1.0, 9.0, 0.5, 0.2])
    sums = curriculum.batch_difficulty(batches, difficulty)
    assert sums.tolist() == [2.0, 9.0, 0.7]
    rng = np.random.default_rng(0)
    assert curriculum.order(sums, 3, rng) == [2, 0, 1]
    hard = curriculum.batch_difficulty(batches, difficulty, True)
    assert curriculum.order(hard, 3, rng) == [1, 0, 2]
    unknown = np.array([1.0, np.inf, 9.0, 0.5, 0.2])
    for backwards, wanted in ((False, [2, 1, 0]), (True, [1, 2, 0])):
        found = curriculum.batch_difficulty(batches, unknown, backwards)
        assert curriculum.order(found, 3, rng) == wanted, "what is unknown comes last"
    assert curriculum.order(np.array([1.0, 0.0, 1.0, 0.0]), 4, rng) == [1, 3, 0, 2]
    drawn = {tuple(curriculum.order(None, 3, np.random.default_rng(s))) for s in range(30)}
    assert len(drawn) == 6


def layout():
    return AdapterLayout.build(
        [
            ("0", "A", "a", (2, 3), 1),
            ("0", "B", "b", (4, 2), 0),
            ("1", "A", "c", (2, 3), 1),
            (HEAD, "weight", "h", (2, 2), None),
        ]
    )


def test_neurons_expand_to_columns_of_a_and_rows_of_b():
    own = layout()
    assert [(s.start, s.stop) for s in own.neurons] == [(0, 3), (3, 7), (7, 10), (10, 10)]
    mask = torch.zeros(10, dtype=torch.bool)
    mask[1] = mask[5] = True
    values = own.expand(mask)
    assert values[own.entries[0].values].reshape(2, 3).tolist() == [[False, True, False]] * 2
    rows = values[own.entries[1].values].reshape(4, 2)
    assert rows.tolist() == [[i == 2] * 2 for i in range(4)]
    assert not values[own.span("1")].any()
    assert values[own.span(HEAD)].all(), "what has no neurons is never masked"


def test_the_best_neurons_of_each_matrix_train():
    own = layout()
    scores = torch.tensor([5.0, 1.0, 3.0, 0.0, 2.0, 2.0, 2.0, 1.0, 9.0, 9.0])
    mask = sparsity.trainable(own, scores, 0.5, own.part(("0",)))
    wanted = torch.tensor([1, 0, 1, 0, 1, 1, 0, 1, 1, 1]).bool()  # ties to the lower index
    assert mask is not None and torch.equal(mask, own.expand(wanted))
    assert sparsity.trainable(own, scores, 1.0, own.part(("0",))) is None
    assert sparsity.trainable(own, None, 0.5, own.part(("0",))) is None, "first participation"
    assert sparsity.trainable(own, scores, 0.5, own.part(())) is None
    zeros = scores.clone()
    zeros[:3] = 0  # A, before B has moved
    unmoved = sparsity.trainable(own, zeros, 0.5, own.part(("0",)))
    assert unmoved is not None and unmoved[own.entries[0].values].all()
    tiny = sparsity.trainable(own, scores, 0.01, own.whole)
    assert tiny is not None
    assert tiny[own.entries[1].values].sum() == 2, "at least one neuron of each matrix"


def test_momentum_of_fisher():
    one = sparsity.momentum(None, torch.tensor([1.0, 2.0]), 0.9)
    assert torch.allclose(one, torch.tensor([0.1, 0.2]))
    two = sparsity.momentum(one, torch.tensor([3.0, 0.0]), 0.9)
    assert torch.allclose(two, torch.tensor([0.39, 0.18]))


def test_the_most_sensitive_layers():
    rng = np.random.default_rng(0)
    scores = np.array([0.3, 0.9, 0.1, 0.9])
    assert layers.choose("sensitivity", 2, "abcd", rng, scores) == ["b", "d"]
    assert layers.choose("sensitivity", 1, "abcd", rng, scores) == ["b"]
    assert [layers.count(share, 6) for share in (0.01, 0.42, 0.5, 0.58, 1.0)] == [1, 3, 3, 3, 6]
    assert layers.count(0.25, 6) == 2
