"""Metrics of the ten tasks, from predicted and true class ids."""

import math

import numpy as np
import numpy.typing as npt

from hpcfed.data.tasks import Metric

Ids = npt.NDArray[np.int64]


def score(predicted: Ids, true: Ids, metric: Metric, positive: int) -> dict[str, float]:
    """`accuracy` always; `f1`, `matthews` where the task asks; `score` is the task's headline.

    predicted, true: (n,) class ids, n >= 1. positive: the class whose F1 and Matthews count.
    """
    accuracy = float(np.mean(predicted == true))
    result = {"accuracy": accuracy, "score": accuracy}
    if metric == "accuracy":
        return result
    hit, truth = predicted == positive, true == positive
    tp, fp = int(np.sum(hit & truth)), int(np.sum(hit & ~truth))
    fn, tn = int(np.sum(~hit & truth)), int(np.sum(~hit & ~truth))
    if metric == "accuracy_f1":
        f1 = 2 * tp / (2 * tp + fp + fn) if tp else 0.0
        return {**result, "f1": f1, "score": (accuracy + f1) / 2}
    spread = math.sqrt(float(tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    matthews = (tp * tn - fp * fn) / spread if spread else 0.0
    return {**result, "matthews": matthews, "score": matthews}


def sampling_error(
    correct: npt.NDArray[np.bool_], owners: npt.NDArray[np.int64], clients: int
) -> float:
    """Standard error of the accuracy over the rows of a sample of clients, for that over all
    `clients`: of a ratio estimator under sampling without replacement (Cochran, Sampling
    Techniques, 2.11 and 6.4). correct, owners: (rows,), whether it is right and whose it is."""
    _, each = np.unique(owners, return_inverse=True)
    rows, right = np.bincount(each), np.bincount(each, weights=correct)
    drawn = len(rows)
    rest = right - right.sum() / rows.sum() * rows
    variance = (1 - drawn / clients) * drawn / (drawn - 1) * (rest**2).sum()
    return float(np.sqrt(variance) / rows.sum())


def over_clients(
    correct: npt.NDArray[np.bool_], owners: npt.NDArray[np.int64]
) -> dict[str, float | int]:
    """How the accuracy is spread over the clients that have rows, each counted once: its mean,
    standard deviation, minimum, and the mean of the tenth of them (rounded up) that fare worst.
    correct, owners: (rows,), whether it is right and whose it is."""
    _, each = np.unique(owners, return_inverse=True)
    own = np.sort(np.bincount(each, weights=correct) / np.bincount(each))
    worst = own[: math.ceil(len(own) / 10)]
    return {
        "clients": len(own),
        "mean": float(own.mean()),
        "std": float(own.std()),
        "worst_tenth": float(worst.mean()),
        "min": float(own[0]),
    }
