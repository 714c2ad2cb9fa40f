"""When an option has an effect: conditions on the rest of the configuration, with their words.

`config.option(..., counts=...)` names one; a value that the user gives where it does not hold is
refused, since a comparison over it would compare a run with itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class When:
    """A condition on a configuration (settings.config.Config), in words that follow "if"."""

    words: str
    holds: Callable[[Any], bool]


LORA = When("adapter.kind is lora", lambda c: c.adapter.kind == "lora")
BOTTLENECK = When("adapter.kind is bottleneck", lambda c: c.adapter.kind == "bottleneck")
PROMPTS = When("adapter.kind is prefix or prompt", lambda c: c.adapter.kind in ("prefix", "prompt"))
NO_BOTTLENECK = When(
    "adapter.kind is lora, prefix or prompt", lambda c: c.adapter.kind != "bottleneck"
)

WORDED = When(
    "model.head is cloze or label_words", lambda c: c.model.head in ("cloze", "label_words")
)

OUTER_DATA = When(
    "task.name is not questions, which are built in", lambda c: c.task.name != "questions"
)
HUB = When(
    "task.name is a hub id, owner/name, and data.root null",
    lambda c: c.data.root is None and "/" in c.task.name,
)
COLUMNS = When(
    "data.root names a folder, and task.name data in it, or task.name is a hub id",
    lambda c: (c.data.root is not None and OUTER_DATA.holds(c)) or HUB.holds(c),
)
DIRICHLET = When("data.partition.kind is dirichlet", lambda c: c.data.partition.kind == "dirichlet")
SIZES = When(
    "data.partition.kind is dirichlet or quantity",
    lambda c: c.data.partition.kind in ("dirichlet", "quantity"),
)
PATHOLOGICAL = When(
    "data.partition.kind is pathological", lambda c: c.data.partition.kind == "pathological"
)
NATURAL = When("data.partition.kind is natural", lambda c: c.data.partition.kind == "natural")

PACED = When("curriculum.pace is not all", lambda c: c.curriculum.pace != "all")
MEASURED = When(
    "curriculum.pace is not all and curriculum.difficulty is fisher, reversed or loss",
    lambda c: PACED.holds(c) and c.curriculum.difficulty in ("fisher", "reversed", "loss"),
)

SENT = When("sharing.rule is not nothing", lambda c: c.sharing.rule != "nothing")
CHOSEN = When("layers.score is not all", lambda c: c.layers.score != "all")
LOSSLESS = When(
    "layers.keep is lossless and layers.score not all",
    lambda c: CHOSEN.holds(c) and c.layers.keep == "lossless",
)
ASKED = When(
    "layers.score is sensitivity or eigenvalue, or layers.keep lossless",
    lambda c: LOSSLESS.holds(c) or c.layers.score in ("sensitivity", "eigenvalue"),
)
HETLORA = When("updates.transforms has hetlora", lambda c: "hetlora" in c.updates.transforms)
WARM = When(
    "something begins after it: a curriculum.pace or layers.score other than all, a sharing.rule "
    "other than layers, or updates.transforms",
    lambda c: (
        PACED.holds(c)
        or CHOSEN.holds(c)
        or c.sharing.rule != "layers"
        or bool(c.updates.transforms)
    ),
)

PERSONAL = When(
    "values are personal, by a layers.score other than all, or by sharing.rule fedsa or nothing",
    lambda c: CHOSEN.holds(c) or c.sharing.rule in ("fedsa", "nothing"),
)
SPARSE = When(
    "sparsity.keep is below 1 and values are personal",
    lambda c: PERSONAL.holds(c) and c.sparsity.keep < 1,
)

PRIVATE = When(
    "privacy.epsilon or privacy.noise is given",
    lambda c: c.privacy.epsilon is not None or c.privacy.noise is not None,
)

STEPS = When("server.optimizer is not mean", lambda c: c.server.optimizer != "mean")
ADAPTIVE = When(
    "server.optimizer is adam or yogi", lambda c: c.server.optimizer in ("adam", "yogi")
)
