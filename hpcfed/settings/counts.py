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


# Kinds of adapter that put virtual tokens beside a text; and those of them that have no values in
# each layer.

IN_FRONT = ("prompt", "idpg", "lpt", "attempt")
VIRTUAL = ("prefix", *IN_FRONT)

LORA = When("adapter.kind is lora", lambda c: c.adapter.kind == "lora")
ADALORA = When("adapter.kind is adalora", lambda c: c.adapter.kind == "adalora")
LOW_RANK = When("adapter.kind is lora or adalora", lambda c: LORA.holds(c) or ADALORA.holds(c))
BOTTLENECK = When("adapter.kind is bottleneck", lambda c: c.adapter.kind == "bottleneck")
PROMPTS = When(f"adapter.kind is one of {', '.join(VIRTUAL)}", lambda c: c.adapter.kind in VIRTUAL)
NO_BOTTLENECK = When("adapter.kind is not bottleneck", lambda c: c.adapter.kind != "bottleneck")
REDUCED = When(
    "adapter.kind is bottleneck, idpg, lpt or attempt",
    lambda c: c.adapter.kind in ("bottleneck", "idpg", "lpt", "attempt"),
)
ATTEMPT = When("adapter.kind is attempt", lambda c: c.adapter.kind == "attempt")
LATE = When("adapter.kind is lpt", lambda c: c.adapter.kind == "lpt")

WORDED = When(
    "model.head is cloze or label_words", lambda c: c.model.head in ("cloze", "label_words")
)

COMPLETED = When("model.head is completion", lambda c: c.model.head == "completion")
# Left padding would change what the other prompts make of a text.
_WRITERS = ("lora", "adalora", "bottleneck", "prefix", "prompt")
WRITES = When(
    f"{COMPLETED.words} and adapter.kind one of {', '.join(_WRITERS)}",
    lambda c: COMPLETED.holds(c) and c.adapter.kind in _WRITERS,
)
WRITTEN = When(
    f"{WRITES.words}, and evaluation.max_new_tokens is given",
    lambda c: WRITES.holds(c) and bool(c.evaluation.max_new_tokens),
)
TESTED = When("evaluation.test is true", lambda c: c.evaluation.test)
PREFERRED = When("model.head is dpo", lambda c: c.model.head == "dpo")
# Rows of prompts and answers, without labels.
ANSWERED = When(
    "model.head is completion or dpo", lambda c: COMPLETED.holds(c) or PREFERRED.holds(c)
)

BUILT_IN = ("questions", "skills")
OUTER_DATA = When(
    f"task.name is not {' or '.join(BUILT_IN)}, which are built in",
    lambda c: c.task.name not in BUILT_IN,
)
HUB = When(
    "task.name is a hub id, owner/name, and data.root null",
    lambda c: c.data.root is None and "/" in c.task.name,
)
COLUMNS = When(
    "data.root names a folder, and task.name data in it, or task.name is a hub id",
    lambda c: (c.data.root is not None and OUTER_DATA.holds(c)) or HUB.holds(c),
)
LABELLED = When(
    f"{COLUMNS.words}, and model.head is neither completion nor dpo",
    lambda c: COLUMNS.holds(c) and not ANSWERED.holds(c),
)
COMPLETIONS = When(
    f"{COLUMNS.words}, and {COMPLETED.words}", lambda c: COLUMNS.holds(c) and COMPLETED.holds(c)
)
PROMPTED = When(
    f"{COLUMNS.words}, and {ANSWERED.words}", lambda c: COLUMNS.holds(c) and ANSWERED.holds(c)
)
PREFERENCES = When(
    f"{COLUMNS.words}, and {PREFERRED.words}", lambda c: COLUMNS.holds(c) and PREFERRED.holds(c)
)
DIRICHLET = When("data.partition.kind is dirichlet", lambda c: c.data.partition.kind == "dirichlet")
SIZES = When(
    "data.partition.kind is dirichlet or quantity",
    lambda c: c.data.partition.kind in ("dirichlet", "quantity"),
)
PATHOLOGICAL = When(
    "data.partition.kind is pathological", lambda c: c.data.partition.kind == "pathological"
)
# Which rows a client has is drawn by what a column says: the label's, or with prompts any.
_BY_KIND = ("dirichlet", "pathological")
COLUMN = When(
    f"data.partition.kind is natural, or dirichlet or pathological and {ANSWERED.words}",
    lambda c: (
        c.data.partition.kind == "natural"
        or (c.data.partition.kind in _BY_KIND and ANSWERED.holds(c))
    ),
)

PACED = When("curriculum.pace is not all", lambda c: c.curriculum.pace != "all")
CUT = When("curriculum.cut is not none", lambda c: c.curriculum.cut != "none")
PACED_OR_CUT = When(
    "curriculum.pace is not all, or curriculum.cut not none",
    lambda c: PACED.holds(c) or CUT.holds(c),
)
MEASURED = When(
    "curriculum.pace is not all and curriculum.difficulty is fisher, reversed or loss",
    lambda c: PACED.holds(c) and c.curriculum.difficulty in ("fisher", "reversed", "loss"),
)

SCHEDULED = When("local.lr_schedule is not constant", lambda c: c.local.lr_schedule != "constant")

SENT = When("sharing.rule is not nothing", lambda c: c.sharing.rule != "nothing")
CHOSEN = When("layers.score is not all", lambda c: c.layers.score != "all")
LOSSLESS = When(
    "layers.keep is lossless and layers.score not all",
    lambda c: CHOSEN.holds(c) and c.layers.keep == "lossless",
)
AGREEING = When(
    "layers.rule is agreement, layers.keep lossless and layers.score not all",
    lambda c: LOSSLESS.holds(c) and c.layers.rule == "agreement",
)
SPECTRAL = When(
    "layers.rule is not agreement, layers.keep lossless and layers.score not all",
    lambda c: LOSSLESS.holds(c) and c.layers.rule != "agreement",
)
ASKED = When(
    "layers.score is sensitivity or eigenvalue, or layers.keep lossless and layers.rule not "
    "agreement",
    lambda c: SPECTRAL.holds(c) or c.layers.score in ("sensitivity", "eigenvalue"),
)
# Aggregation rules that move the backbone.
MOVING = ("fedex", "flora", "delta")
RESIDUAL = When("aggregation.rule is fedex, flora or delta", lambda c: c.aggregation.rule in MOVING)
DELTA = When("aggregation.rule is delta", lambda c: c.aggregation.rule == "delta")
SLORA = When("aggregation.rule is slora", lambda c: c.aggregation.rule == "slora")
BUDGET = When("aggregation.rule is budget", lambda c: c.aggregation.rule == "budget")
FAIR = When("aggregation.rule is fair", lambda c: c.aggregation.rule == "fair")
RANKS = When(
    "updates.transforms has hetlora or ranks",
    lambda c: bool({"hetlora", "ranks"} & set(c.updates.transforms)),
)
HETLORA = When("updates.transforms has hetlora", lambda c: "hetlora" in c.updates.transforms)
WARM = When(
    "something begins after it: a curriculum.pace or layers.score other than all, a sharing.rule "
    "other than layers, an aggregation.rule other than mean, or updates.transforms",
    lambda c: (
        PACED.holds(c)
        or CHOSEN.holds(c)
        or c.sharing.rule != "layers"
        or c.aggregation.rule != "mean"
        or bool(c.updates.transforms)
    ),
)

PERSONAL = When(
    "values are personal, by a layers.score other than all, or by sharing.rule fedsa or nothing",
    lambda c: CHOSEN.holds(c) or c.sharing.rule in ("fedsa", "nothing"),
)
SYNCED = When(
    "values are personal, by a layers.score other than all, or by sharing.rule fedsa, and "
    "federation.rounds leaves so many after curriculum.warmup",
    lambda c: (
        PERSONAL.holds(c)
        and SENT.holds(c)
        and (c.layers.sync_every or 1) <= c.federation.rounds - c.curriculum.warmup
    ),
)
SPARSE = When(
    "sparsity.keep is below 1 and values are personal",
    lambda c: PERSONAL.holds(c) and c.sparsity.keep < 1,
)

PRIVATE = When(
    "privacy.epsilon or privacy.noise is given",
    lambda c: c.privacy.epsilon is not None or c.privacy.noise is not None,
)
BY_SAMPLE = When(
    "privacy.unit is sample, and privacy.epsilon or privacy.noise given",
    lambda c: PRIVATE.holds(c) and c.privacy.unit == "sample",
)
BY_CLIENT = When(
    "privacy.unit is client, and privacy.epsilon or privacy.noise given",
    lambda c: PRIVATE.holds(c) and c.privacy.unit == "client",
)

STEPS = When("server.optimizer is not mean", lambda c: c.server.optimizer != "mean")
ADAPTIVE = When(
    "server.optimizer is adam or yogi", lambda c: c.server.optimizer in ("adam", "yogi")
)


def first_stage(config: Any) -> int:
    """Rounds of SLoRA's first stage."""
    return max(1, round(config.aggregation.first_stage * config.federation.rounds))
