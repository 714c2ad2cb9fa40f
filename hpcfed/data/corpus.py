"""The built-in task `questions`: what kind of answer does a question want?

Generated, so that a first run needs no download: 5 classes, 2,400 training and 600 test questions.
Half of the questions are easy (the question word gives the class away), half are hard (no question
word, or one that misleads). No subject and no hard wording of the test split occurs in training.
"""

from collections.abc import Sequence

import numpy as np

from hpcfed.rng import generator

NAME = "questions"
TRAIN_PER_CLASS, TEST_PER_CLASS = 480, 120

_FIRST = (
    "Abel Alma Anton Clara Dario Edith Elena Felix Greta Hugo Ines Ivan Jonas Karin Laura Lukas "
    "Marta Milan Nadia Oscar Paula Pavel Rosa Simon Tessa Viktor Wanda Yusuf Zelda Boris"
).split()
_LAST = (
    "Abramov Bergman Castell Dahlgren Eriksen Fontana Gerhardt Hoffer Ibsen Jansen Keller "
    "Lindqvist Moreau Novak Olsen Petrov Quint Rossi Sandoval Tanaka Urban Varga Winther Ystad "
    "Zamora"
).split()
_KIND = (
    "bridge cathedral canal castle comet festival harbour lighthouse library monastery museum "
    "novel observatory opera orchestra painting railway regatta statue symphony theatre treaty "
    "tunnel university vineyard volcano"
).split()
_NAMES = (
    "Aldermoor Brightwater Calverton Dunmore Eastvale Fairhaven Glenrock Halden Inverness Jarrow "
    "Kestrel Longford Marston Northgate Oakfield Penrose Queensbury Redcliff Silverton Thornbury "
    "Ulverston Vellmar Westbrook Yarrow Zellwood Ashdown Blackwell Corvale Drayton Elmstead"
).split()

# class -> (easy wordings, hard wordings); {thing} and {person} are filled in. A hard wording has no
# question word that gives the class away, or one that points to another class. Every third hard
# wording is kept for the test split.
_WORDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "person": (
        ("Who designed the {thing}?", "Who was the founder of the {thing}?",
         "Who inspired {person} to restore the {thing}?", "Who paid for the {thing}?"),
        ("Name the architect behind the {thing}.", "Whose idea was the {thing}?",
         "The {thing} owes its existence to which engineer?",
         "When the {thing} opened, which mayor gave the speech?",
         "I would like to know the teacher of {person}.",
         "Where the {thing} stands, which king was crowned?",
         "What was the maiden name of the wife of {person}?",
         "Give the heir to whom {person} left the {thing}.",
         "How is the present owner of the {thing} called?"),
    ),
    "place": (
        ("Where is the {thing}?", "Where was {person} born?",
         "Where can visitors see the {thing}?", "Where did {person} spend the summer?"),
        ("Name the city that is home to the {thing}.", "In which country does {person} live?",
         "The {thing} stands on the shore of which lake?",
         "When travelling to the {thing}, at which station does one get off?",
         "I would like to know the street of the {thing}.",
         "What town did {person} move to because of the {thing}?",
         "Who knows the village near the {thing}?",
         "Give the region from which {person} came.",
         "How is the valley below the {thing} called?"),
    ),
    "number": (
        ("How many people visit the {thing}?", "How much did the {thing} cost?",
         "How many books did {person} write?", "How tall is the {thing}?"),
        ("Give the length of the {thing} in metres.", "What is the population around the {thing}?",
         "Name the sum that {person} paid for the {thing}.",
         "I would like to know the weight of the {thing} in tonnes.",
         "Who can tell the amount of money lost with the {thing}?",
         "What share of the {thing} belongs to {person}?",
         "Where the {thing} is widest, what does it measure?",
         "The {thing} employs a staff of what size?",
         "When {person} bought the {thing}, what was the price?"),
    ),
    "time": (
        ("When was the {thing} finished?", "When did {person} die?",
         "When does the {thing} open?", "When will {person} return to the {thing}?"),
        ("Name the year in which the {thing} was destroyed.", "In which century did {person} live?",
         "Give the date on which {person} saw the {thing}.",
         "How early in the morning does the {thing} open?",
         "I would like to know the season that suits the {thing}.",
         "What day of the week did {person} visit the {thing}?",
         "Who remembers the decade that brought the {thing}?",
         "How long ago did {person} found the {thing}?",
         "Where the {thing} is concerned, which month is the busiest?"),
    ),
    "reason": (
        ("Why was the {thing} closed?", "Why did {person} leave the {thing}?",
         "Why is the {thing} famous?", "Why does {person} dislike the {thing}?"),
        ("Explain the decline of the {thing}.", "What made {person} give up the {thing}?",
         "For what purpose was the {thing} moved?",
         "How come {person} never finished the {thing}?",
         "I would like to know the cause of the fire in the {thing}.",
         "Who can say what drove {person} to sell the {thing}?",
         "Name the motive of {person} for attacking the {thing}.",
         "What is the {thing} good for?",
         "When {person} refused the {thing}, on what grounds?"),
    ),
}  # fmt: skip


def generate() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(train, test) lists of (text, label), the same at every call, no text twice."""
    rng = generator(0, "corpus")
    splits = []
    for half, per_class in ((0, TRAIN_PER_CLASS), (1, TEST_PER_CLASS)):
        rows: list[tuple[str, str]] = []
        for label, wordings in _WORDINGS.items():
            seen: set[str] = set()
            while len(seen) < per_class:
                hard = len(seen) % 2 == 1
                text = _pick(wordings[hard], half if hard else None, rng, every=3).format(
                    thing=f"{_KIND[rng.integers(len(_KIND))]} of {_pick(_NAMES, half, rng)}",
                    person=f"{_FIRST[rng.integers(len(_FIRST))]} {_pick(_LAST, half, rng)}",
                )
                seen.add(text)
            rows.extend((text, label) for text in sorted(seen))
        splits.append([rows[i] for i in rng.permutation(len(rows))])
    return splits[0], splits[1]


def _pick(words: Sequence[str], half: int | None, rng: np.random.Generator, every: int = 5) -> str:
    """A random word; every fifth (or `every`-th) is kept for the test split, which is half 1."""
    if half is not None:
        words = [w for i, w in enumerate(words) if (i % every == every - 1) == bool(half)]
    return words[int(rng.integers(len(words)))]
