"""How far clients agree on a layer: from the norms of their updates and of the updates' mean."""

import numpy as np

from hpcfed.data.batches import Floats


def agreement(norms: Floats, weights: Floats, mean: Floats) -> Floats | None:
    """(L,) what two clients' updates have in common, over all pairs; None if there is no pair.

        a = sum_{j != k} w_j w_k <u_j, u_k> / sum_k w_k (1 - w_k) ||u_k||^2
          = (||sum_k w_k u_k||^2 - sum_k w_k^2 ||u_k||^2) / sum_k w_k (1 - w_k) ||u_k||^2

    norms (K, L): ||u_k||^2 of each client and layer. weights (K,): as in the mean, of any sum.
    mean (L,): ||sum_k w_k u_k||^2. 1 where all updates are the same, 0 on average where they are
    independent, whatever the weights and norms, below 0 where they cancel each other. With K equal
    weights it is (r - 1/K) / (1 - 1/K), r = ||mean u||^2 / mean ||u||^2. 0 where nothing moved.
    """
    if np.count_nonzero(weights) < 2:
        return None
    w = weights / weights.sum()
    apart = w**2 @ norms
    most = w @ norms - apart
    moved = most > 0
    found: Floats = np.divide(mean - apart, most, out=np.zeros_like(most), where=moved)
    return found
