"""The error of an accuracy that only a sample of the clients was asked for."""

import numpy as np
import pytest

from hpcfed.data.metrics import over_clients, sampling_error


def test_it_is_the_spread_over_many_samples():
    """Of 200 clients of unlike sizes and accuracies, 40 are drawn, many times."""
    rng = np.random.default_rng(7)
    clients, drawn = 200, 40
    sizes = rng.integers(2, 30, clients)
    chances = rng.beta(4, 2, clients)
    owners = np.repeat(np.arange(clients), sizes)
    correct = rng.random(len(owners)) < chances[owners]
    found, errors = [], []
    for _ in range(400):
        mine = np.isin(owners, rng.choice(clients, drawn, replace=False))
        found.append(correct[mine].mean())
        errors.append(sampling_error(correct[mine], owners[mine], clients))
    assert np.mean(found) == pytest.approx(correct.mean(), abs=4 * np.std(found) / 20)
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(found), rel=0.12)


def test_everyone_asked_has_no_error():
    owners = np.array([0, 0, 1, 2, 2, 2])
    correct = np.array([True, False, True, True, True, False])
    assert sampling_error(correct, owners, 3) == 0
    assert sampling_error(correct, owners, 30) > 0


def test_the_spread_over_clients_is_that_of_a_plain_loop():
    rng = np.random.default_rng(0)
    for clients in (1, 3, 10, 23):
        owners = np.concatenate([np.arange(clients) * 2, rng.integers(0, clients, 50) * 2])
        correct = rng.random(len(owners)) < 0.6
        each = sorted(
            sum(c for c, k in zip(correct, owners, strict=True) if k == own)
            / list(owners).count(own)
            for own in set(owners.tolist())
        )
        worst = each[: -(-clients // 10)]
        mean = sum(each) / clients
        assert over_clients(correct, owners) == pytest.approx(
            {
                "clients": clients, "mean": mean, "min": each[0],
                "std": (sum((own - mean) ** 2 for own in each) / clients) ** 0.5,
                "worst_tenth": sum(worst) / len(worst),
            }
        )  # fmt: skip
