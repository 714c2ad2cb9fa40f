"""Which GPU a rank takes."""

import pytest

from hpcfed.cluster.devices import choose_gpus


@pytest.mark.parametrize(
    ("views", "chosen"),
    [
        ([["a", "b", "c"]] * 3, [0, 1, 2]),  # all see all
        ([["a", "b"]] * 5, [0, 1, 0, 1, 0]),  # more ranks than GPUs
        ([["a"], ["b"], ["c"], ["d"]], [0, 0, 0, 0]),  # each its own, and numbers it 0
        ([["a"], ["a"]], [0, 0]),
        ([["a", "b"], ["c", "d"], ["a", "b"], ["c", "d"]], [0, 0, 1, 1]),
        ([["a", "b"], ["b", "c"], ["b", "c"]], [0, 0, 1]),
    ],
)
def test_each_takes_the_gpu_that_the_fewest_have(views, chosen):
    assert choose_gpus(views) == chosen
