"""Which rows are whose: train, validation and test rows of every client.

Sources: label and size skew as in the published FedPepTAO code (sizes ~ Dirichlet(5), class prior
~ Dirichlet(alpha), drawn without replacement until all rows are assigned; the test split uses the
same sizes and priors). Every row belongs to exactly one client.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hpcfed.data.sources import Split, TaskData
from hpcfed.errors import UserError
from hpcfed.rng import generator
from hpcfed.settings.config import Config

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ClientRows:
    """Row numbers of one client; train and validation index the train split."""

    train: Ids
    validation: Ids
    test: Ids


def partition(task: TaskData, config: Config) -> list[ClientRows]:
    """The rows of each of `federation.clients` clients, each with at least one training row.

    Raises UserError where the data cannot be shared out as asked.
    """
    clients = config.federation.clients
    if clients > len(task.train):
        raise UserError(
            f"federation.clients is {clients} but task {task.name!r} has {len(task.train)} "
            "training rows; each client needs at least one."
        )
    rng = generator(config.seed, "partition")
    if config.data.partition.kind == "natural":
        train, test = _natural(task, clients, rng)
    else:
        fractions, priors = _shape(task, config, rng)
        train = _draw(task.train, fractions, priors, rng, at_least=1)
        test = _draw(task.test, fractions, priors, rng, at_least=0)
    result = []
    for client in range(clients):
        rows = train[client][
            generator(config.seed, "validation", client).permutation(len(train[client]))
        ]
        held_out = min(int(len(rows) * config.data.validation), len(rows) - 1)
        result.append(
            ClientRows(np.sort(rows[held_out:]), np.sort(rows[:held_out]), np.sort(test[client]))
        )
    return result


def _shape(task: TaskData, config: Config, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Fraction of the rows (K,) and class prior (K, classes) of each client."""
    spec, clients = config.data.partition, config.federation.clients
    classes = len(task.labels)
    frequencies = np.bincount(task.train.labels, minlength=classes) / len(task.train)
    fractions = np.full(clients, 1 / clients)
    priors = np.tile(frequencies, (clients, 1))
    if spec.kind in ("dirichlet", "quantity"):
        fractions = rng.dirichlet(np.full(clients, spec.size_concentration))
    if spec.kind == "dirichlet":
        priors = rng.dirichlet(np.full(classes, spec.alpha), size=clients)
    if spec.kind == "pathological":
        if spec.classes_per_client > classes:
            raise UserError(
                f"data.partition.classes_per_client is {spec.classes_per_client} but task "
                f"{task.name!r} has {classes} classes."
            )
        priors = np.zeros((clients, classes))
        deck: list[int] = []
        for client in range(clients):  # deal classes round by round, so that all are held
            while len(set(deck)) < spec.classes_per_client:
                deck.extend(rng.permutation(classes).tolist())
            hand = list(dict.fromkeys(deck))[: spec.classes_per_client]
            for label in hand:
                deck.remove(label)
            priors[client, hand] = 1 / spec.classes_per_client
    return fractions, priors


def _draw(
    split: Split, fractions: Floats, priors: Floats, rng: np.random.Generator, at_least: int
) -> list[Ids]:
    """Deal the rows out: clients take turns in random order, each turn draws a class by the
    client's prior (restricted to classes with rows left), then the next row of that class."""
    sizes = _sizes(len(split), fractions, at_least)
    piles = [
        rng.permutation(np.flatnonzero(split.labels == label)).tolist()
        for label in range(priors.shape[1])
    ]
    left = np.array([len(pile) for pile in piles])
    dealt: list[list[int]] = [[] for _ in sizes]
    turns = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    for client, luck in zip(turns.tolist(), rng.random(len(turns)).tolist(), strict=True):
        weights = np.where(left > 0, priors[client], 0.0)
        if weights.sum() <= 0:  # none of its classes has rows left
            weights = left.astype(np.float64)
        cumulative = np.cumsum(weights)
        label = int(np.searchsorted(cumulative, luck * cumulative[-1], side="right"))
        label = min(label, int(np.flatnonzero(weights)[-1]))
        dealt[client].append(piles[label].pop())
        left[label] -= 1
    return [np.array(rows, dtype=np.int64) for rows in dealt]


def _sizes(total: int, fractions: Floats, at_least: int) -> Ids:
    """Whole numbers that add up to `total`, proportional to fractions (largest remainder)."""
    spare = total - at_least * len(fractions)
    exact = fractions / fractions.sum() * spare
    sizes = np.floor(exact).astype(np.int64)
    remainder = np.argsort(-(exact - sizes), kind="stable")[: spare - int(sizes.sum())]
    sizes[remainder] += 1
    return sizes + at_least


def _natural(task: TaskData, clients: int, rng: np.random.Generator) -> tuple[list[Ids], list[Ids]]:
    if task.train.owners is None or task.test.owners is None:
        raise UserError(
            "data.partition.kind natural needs data.partition.column, the column that names the "
            "client, in both train and test rows."
        )
    names = sorted(set(task.train.owners))
    if len(names) != clients:
        raise UserError(
            f"The column names {len(names)} clients in the training rows; "
            f"set federation.clients={len(names)}."
        )
    stranger = next((name for name in task.test.owners if name not in set(names)), None)
    if stranger is not None:
        raise UserError(f"Test rows belong to {stranger!r}, a client without training rows.")
    train, test = np.array(task.train.owners), np.array(task.test.owners)
    return (
        [np.flatnonzero(train == name) for name in names],
        [np.flatnonzero(test == name) for name in names],
    )


def summary(task: TaskData, rows: list[ClientRows]) -> dict[str, object]:
    """Clients x classes: how many rows of each class every client holds in each split."""
    width = len(task.labels)

    def table(split: Split, picks: list[Ids]) -> list[list[int]]:
        return [np.bincount(split.labels[ids], minlength=width).tolist() for ids in picks]

    return {
        "labels": list(task.labels),
        "train": table(task.train, [r.train for r in rows]),
        "validation": table(task.train, [r.validation for r in rows]),
        "test": table(task.test, [r.test for r in rows]),
    }
