"""Learning rates over rounds."""

import math

import pytest

from hpcfed.policies.rates import rate


def test_rates_fall_from_the_first_towards_the_last():
    cosine = [rate("cosine", 5e-5, 1e-6, t, 4) for t in range(4)]
    wanted = [1e-6 + 4.9e-5 / 2 * (1 + math.cos(math.pi * t / 4)) for t in range(4)]
    assert cosine == pytest.approx(wanted) and cosine[0] == 5e-5
    assert [rate("linear", 1.0, 0.0, t, 4) for t in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert {rate("constant", 1.0, 0.0, t, 4) for t in range(4)} == {1.0}
