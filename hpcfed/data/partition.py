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
    """The rows of each of `federation.clients` clients, each with at least one training row; if
    it is null, of as many as the data name. With federation.pooled one client has them all.

    Raises UserError where the data cannot be shared out as asked.
    """
    clients = _number(task, config)
    if clients > len(task.train):
        raise UserError(
            f"federation.clients is {clients} but task {task.name!r} has {len(task.train)} "
            "training rows; each client needs at least one."
        )
    rng = generator(config.seed, "partition")
    if config.data.partition.kind == "natural":
        train, test = _natural(task, rng)
    else:
        fractions, priors = _shape(task, clients, config, rng)
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
    if config.federation.pooled:
        names = ("train", "validation", "test")
        parts = [[getattr(rows, name) for rows in result] for name in names]
        return [ClientRows(*(np.sort(np.concatenate(part)) for part in parts))]
    return result


def _number(task: TaskData, config: Config) -> int:
    """K, the number of clients, counted if it is null. Raises UserError where it does not fit the
    data."""
    spec, kind = config.federation, config.data.partition.kind
    if kind != "natural":
        if spec.clients is None:
            raise UserError(
                f"federation.clients is null, but with data.partition.kind={kind} there is nothing "
                "to count; give a number."
            )
        return spec.clients
    if task.train.owners is None:
        raise UserError(
            "data.partition.kind=natural needs data.partition.column, the column that names the "
            "client, and data that have one."
        )
    named = len(set(task.train.owners))
    if spec.clients not in (None, named):
        raise UserError(
            f"The column names {named} clients in the training rows; "
            f"set federation.clients={named}, or null."
        )
    if spec.per_round > named:
        raise UserError(
            f"federation.per_round is {spec.per_round} but the training rows name {named} clients; "
            "no more can be sampled than there are."
        )
    return named


def _shape(
    task: TaskData, clients: int, config: Config, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """Fraction of the rows (K,) and class prior (K, classes) of each client."""
    spec = config.data.partition
    classes = len(task.kinds)
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


def _natural(task: TaskData, rng: np.random.Generator) -> tuple[list[Ids], list[Ids]]:
    """Rows of the clients that the rows name, in the order of their names. Test rows that name no
    client are dealt out by the sizes and label priors of the training rows."""
    owners = task.train.owners or []
    place = {name: client for client, name in enumerate(_names(owners))}
    train = _by_owner(owners, place)
    if task.test.owners is not None:
        return train, _by_owner(task.test.owners, place)
    held = [np.bincount(task.train.labels[rows], minlength=len(task.kinds)) for rows in train]
    sizes = np.array([len(rows) for rows in train])
    priors = np.array(held) / sizes[:, None]
    return train, _draw(task.test, sizes / len(task.train), priors, rng, at_least=0)


def _names(owners: list[str]) -> list[str]:
    """The clients' names; a client's number is its name's place."""
    return sorted(set(owners))


def _by_owner(owners: list[str], place: dict[str, int]) -> list[Ids]:
    """Row numbers of each client, in order."""
    found: list[list[int]] = [[] for _ in place]
    for row, owner in enumerate(owners):
        found[place[owner]].append(row)
    return [np.array(rows, dtype=np.int64) for rows in found]


def summary(task: TaskData, rows: list[ClientRows]) -> dict[str, object]:
    """Clients x classes: how many rows of each class every client holds in each split; and the
    names of natural clients."""
    width = len(task.kinds)

    def table(split: Split, picks: list[Ids]) -> list[list[int]]:
        return [np.bincount(split.labels[ids], minlength=width).tolist() for ids in picks]

    names = {} if task.train.owners is None else {"clients": _names(task.train.owners)}
    return {
        **names,
        "labels": list(task.kinds),
        "train": table(task.train, [r.train for r in rows]),
        "validation": table(task.train, [r.validation for r in rows]),
        "test": table(task.test, [r.test for r in rows]),
    }
