"""How a learning rate changes from round to round; inside a round it is constant."""

import math
from typing import Literal

Schedule = Literal["constant", "cosine", "linear"]


def rate(schedule: Schedule, first: float, last: float, round_number: int, rounds: int) -> float:
    """The rate of a round, from 0: `first` in that one; `last` is where the rates lead, and would
    be reached in round `rounds`, as in OpenFedLLM."""
    if schedule == "constant":
        return first
    done = round_number / rounds
    left = 1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return last + (first - last) * left
