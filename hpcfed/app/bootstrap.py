"""Paired bootstrap over test rows: how far a difference of scores could be chance.

Rows are drawn with replacement, the same rows for both methods; a score is the mean over seeds.
What another seed would give is not in the interval: the spread over seeds shows that.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from hpcfed.app.cells import Rows

DRAWS, SEED, LEVEL = 10_000, 0, 0.95
_CHUNK = 500  # draws at a time

Floats = npt.NDArray[np.float64]


def scores(runs: Sequence[Sequence[Rows]]) -> Floats:
    """(draws, methods): the mean score over seeds in each draw. runs: of each method, a run for
    each seed, in the same order of seeds; all of a seed's runs have the same rows.

    Seeds that have the same test rows get the same draws of them, others draws of their own.
    """
    total = np.zeros((DRAWS, len(runs)))
    groups: dict[str, list[int]] = {}
    for seed, rows in enumerate(runs[0]):
        groups.setdefault(rows.same, []).append(seed)
    for number, seeds in enumerate(groups.values()):
        chosen = [[runs[m][seed] for seed in seeds] for m in range(len(runs))]
        columns = np.stack([_columns(rows) for own in chosen for rows in own])  # (runs, k, n)
        size = columns.shape[2]
        flat = columns.reshape(-1, size).T.astype(np.float32)
        start = 0
        for counts in _counts(size, number):
            sums = (counts @ flat).reshape(len(counts), *columns.shape[:2]).astype(np.float64)
            values = _score(sums, size, runs[0][0].metric)  # (chunk, runs)
            part = values.reshape(len(counts), len(runs), len(seeds)).sum(2)
            total[start : start + len(counts)] += part
            start += len(counts)
    return total / len(runs[0])


def score(rows: Rows) -> float:
    """The metric itself."""
    sums = _columns(rows).sum(1, dtype=np.float64)[None, None]
    return float(_score(sums, len(rows.right), rows.metric)[0, 0])


def interval(differences: Floats) -> tuple[float, float]:
    """The LEVEL interval of a difference: (draws,) -> (low, high)."""
    low, high = np.quantile(differences, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _counts(size: int, group: int) -> Iterator[npt.NDArray[np.float32]]:
    """(chunk, size): how often each row is in a draw."""
    rng = np.random.default_rng([SEED, group])
    for start in range(0, DRAWS, _CHUNK):
        draws = min(_CHUNK, DRAWS - start)
        rows = rng.integers(0, size, (draws, size))
        rows += np.arange(draws)[:, None] * size
        counts = np.bincount(rows.ravel(), minlength=draws * size)
        yield counts.reshape(draws, size).astype(np.float32)


def _columns(rows: Rows) -> npt.NDArray[np.bool_]:
    """(k, n): what the metric is made of, by its sums over rows."""
    if rows.metric == "accuracy":
        return rows.right[None]
    assert rows.hit is not None and rows.truth is not None
    return np.stack([rows.right, rows.hit & rows.truth, rows.hit, rows.truth])


def _score(sums: Floats, size: int, metric: str) -> Floats:
    """The metric of sums (..., k) over `size` rows; as hpcfed.data.metrics has it."""
    accuracy = sums[..., 0] / size
    if metric == "accuracy":
        return accuracy
    tp, hit, truth = sums[..., 1], sums[..., 2], sums[..., 3]
    if metric == "accuracy_f1":
        f1 = np.divide(2 * tp, hit + truth, out=np.zeros_like(tp), where=hit + truth > 0)
        return (accuracy + f1) / 2
    tn = size - hit - truth + tp
    spread = np.sqrt(hit * truth * (size - hit) * (size - truth))
    product = tp * tn - (hit - tp) * (truth - tp)
    return np.divide(product, spread, out=np.zeros_like(tp), where=spread > 0)
