"""A small corpus of instructions with one defined answer each, one skill a client.

    python examples/instructions.py data/skills
    hpcfed run examples/skills.yaml --ranks 2

Written by this program and free to use under the project's licence. Rows are JSONL with `prompt`,
`completion` and `client`; the skills are to sort numbers, to reverse words, to take a field out of
a record, and to convert units, each held by two clients.
"""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

WORDS = "river stone cloud green table paper winter garden silver market bridge candle".split()
NAMES = "Ada Ben Cora Dan Eva Finn Gina Hugo".split()
CITIES = "Lima Oslo Cairo Paris Quito Delhi Turin Kyoto".split()
UNITS = (("metres", "centimetres", 100), ("hours", "minutes", 60), ("kilograms", "grams", 1000))
CLIENTS = 2  # of a skill
TRAIN, TEST = 48, 10  # rows of a client
Skill = Callable[[random.Random], tuple[str, str]]


def sort(rng: random.Random) -> tuple[str, str]:
    """Four numbers, ascending."""
    numbers = rng.sample(range(1, 100), 4)
    return f"Sort these numbers: {_listed(numbers)}.", _listed(sorted(numbers))


def reverse(rng: random.Random) -> tuple[str, str]:
    """Three words, the last one first."""
    words = rng.sample(WORDS, 3)
    return f"Reverse the order of the words: {' '.join(words)}.", " ".join(reversed(words))


def extract(rng: random.Random) -> tuple[str, str]:
    """A person's city."""
    name, city, age = rng.choice(NAMES), rng.choice(CITIES), rng.randint(20, 80)
    return f"Record: name={name}; age={age}; city={city}. Which city is it?", city


def convert(rng: random.Random) -> tuple[str, str]:
    """A whole number of a larger unit in a smaller one."""
    large, small, factor = rng.choice(UNITS)
    number = rng.randint(2, 20)
    return f"Convert {number} {large} to {small}.", f"{number * factor} {small}"


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def main(folder: Path, seed: int = 0) -> None:
    """Write train.jsonl and test.jsonl; no prompt of the test rows is trained on."""
    rows: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    for skill in (sort, reverse, extract, convert):
        rng = random.Random(f"{seed} {skill.__name__}")
        held: dict[str, str] = {}
        while len(held) < CLIENTS * TEST:
            held.update([skill(rng)])
        for number, (prompt, answer) in enumerate(held.items()):
            rows["test"].append(_row(skill, number, prompt, answer))
        trained = 0
        while trained < CLIENTS * TRAIN:
            prompt, answer = skill(rng)
            if prompt not in held:
                rows["train"].append(_row(skill, trained, prompt, answer))
                trained += 1
    folder.mkdir(parents=True, exist_ok=True)
    for split, own in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in own)
        (folder / f"{split}.jsonl").write_text(text)


def _row(skill: Skill, number: int, prompt: str, answer: str) -> dict[str, str]:
    client = f"{skill.__name__}-{number % CLIENTS}"
    return {"prompt": prompt, "completion": answer, "client": client}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
