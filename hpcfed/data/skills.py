"""The built-in task `skills`: instructions with one defined answer each, a skill a client.

Generated, so that a first instruction tuning needs no data: to sort numbers, to reverse words, to
take a field out of a record, and to convert units, each held by two clients. Written by this
program and free to use under the project's licence.
"""

import random
from collections.abc import Callable
from typing import Any

NAME = "skills"
CLIENTS = 2  # of a skill
TRAIN, TEST = 48, 10  # rows of a client

_WORDS = "river stone cloud green table paper winter garden silver market bridge candle".split()
_NAMES = "Ada Ben Cora Dan Eva Finn Gina Hugo".split()
_CITIES = "Lima Oslo Cairo Paris Quito Delhi Turin Kyoto".split()
_UNITS = (("metres", "centimetres", 100), ("hours", "minutes", 60), ("kilograms", "grams", 1000))
Skill = Callable[[random.Random], tuple[str, str]]


def sort(rng: random.Random) -> tuple[str, str]:
    """Four numbers, ascending."""
    numbers = rng.sample(range(1, 100), 4)
    return f"Sort these numbers: {_listed(numbers)}.", _listed(sorted(numbers))


def reverse(rng: random.Random) -> tuple[str, str]:
    """Three words, the last one first."""
    words = rng.sample(_WORDS, 3)
    return f"Reverse the order of the words: {' '.join(words)}.", " ".join(reversed(words))


def extract(rng: random.Random) -> tuple[str, str]:
    """A person's city."""
    name, city, age = rng.choice(_NAMES), rng.choice(_CITIES), rng.randint(20, 80)
    return f"Record: name={name}; age={age}; city={city}. Which city is it?", city


def convert(rng: random.Random) -> tuple[str, str]:
    """A whole number of a larger unit in a smaller one."""
    large, small, factor = rng.choice(_UNITS)
    number = rng.randint(2, 20)
    return f"Convert {number} {large} to {small}.", f"{number * factor} {small}"


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def generate() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(train, test) records of `prompt`, `completion`, `skill` and `client`, the same at every
    call; no prompt of the test rows is trained on."""
    train, test = [], []
    for skill in (sort, reverse, extract, convert):
        rng = random.Random(f"0 {skill.__name__}")
        held: dict[str, str] = {}
        while len(held) < CLIENTS * TEST:
            held.update([skill(rng)])
        test += [_record(skill, number, *row) for number, row in enumerate(held.items())]
        kept: list[tuple[str, str]] = []
        while len(kept) < CLIENTS * TRAIN:
            prompt, answer = skill(rng)
            if prompt not in held:
                kept.append((prompt, answer))
        train += [_record(skill, number, *row) for number, row in enumerate(kept)]
    return train, test


def _record(skill: Skill, number: int, prompt: str, answer: str) -> dict[str, Any]:
    name = skill.__name__
    client = f"{name}-{number % CLIENTS}"
    return {"prompt": prompt, "completion": answer, "skill": name, "client": client}
