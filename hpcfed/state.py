"""What a run is between two rounds: all that a commit holds.

Everything else is made from the configuration, or derived from the seed. All of it is the same on
every rank, but for seconds.
"""

from dataclasses import dataclass, field

import torch

PHASES = ("select", "score", "train", "exchange", "evaluate")

# What clients keep: values of layers that stay home, with the Fisher momentum; difficulties; the
# optimizer's moments; control variates; what update transforms remember.
PERSONAL, CURRICULUM, MOMENTS, CONTROL = "personal", "curriculum", "moments", "control"
UPDATES = "updates"
KINDS = (PERSONAL, CURRICULUM, MOMENTS, CONTROL, UPDATES)


@dataclass
class ServerState:
    """What the server's step remembers: vectors (layout.size,) by name, and its rate."""

    lr: float
    vectors: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class ClientFiles:
    """Of one kind of client state: client -> the round whose file holds it; now, and at the round
    that was best on validation. replaced: (client, round) of the files that only the last commit
    refers to; in a commit, only the one before it."""

    current: dict[int, int] = field(default_factory=dict)
    pinned: dict[int, int] = field(default_factory=dict)
    replaced: set[tuple[int, int]] = field(default_factory=set)


@dataclass
class Best:
    """The round, from 0, that was best on validation, and its values (layout.size,)."""

    round: int
    score: float
    values: torch.Tensor


@dataclass
class Totals:
    """What all rounds have cost; the names are those of summary.json. up, down, wire: bytes."""

    samples: int = 0
    scored: int = 0
    tokens: int = 0
    steps: int = 0
    updates: int = 0
    failures: int = 0
    up: int = 0
    down: int = 0
    wire: int = 0


@dataclass
class Seconds:
    """Of all lives of the run. tail: from the end of a round's training to its commit, of the
    slowest so far."""

    phases: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    init: float = 0.0
    total: float = 0.0
    tail: float | None = None


@dataclass
class PrivacyState:
    """noise: z, which was solved for when the run began. clip: the norm of the next round's
    updates. key: the digest of the run's secret key."""

    noise: float
    clip: float
    key: str


@dataclass
class RunState:
    """The run after `rounds` rounds.

    values (layout.size,) fp32: those of the shared part as the server made them last; elsewhere
    those that a client begins with that has none of its own: the warm-up's, or the mean of the
    last round of layers.sync_every. chosen: the blocks whose layers are
    shared, and the head. agreement: how far clients agreed on each layer in the last warm-up round
    (importance/agreement.py), where layers.rule asks for it; empty: nobody could tell.
    """

    values: torch.Tensor
    chosen: tuple[str, ...]
    server: ServerState
    rounds: int = 0
    best: Best | None = None
    clients: dict[str, ClientFiles] = field(
        default_factory=lambda: {kind: ClientFiles() for kind in KINDS}
    )
    totals: Totals = field(default_factory=Totals)
    seconds: Seconds = field(default_factory=Seconds)
    privacy: PrivacyState | None = None
    agreement: tuple[float, ...] = ()
