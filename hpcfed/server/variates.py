"""Control variates: what a client adds to the exchange besides its values, and what the server
makes of the sums.

On the server (`server.control`) they make up for the clients that were not sampled. In momentum of
differences they are FedPepTAO's: c_i' = c_i - c + (w - w_i) / (s_i local_lr), c' = c + m/K sum
s_i/s_S (c_i' - c_i), and the n_i-weighted mean of c' - c_i' is added to v'. In plain momentum they
are our reading, which keeps to one unit: c_i' = w - w_i, a client's last update; c = sum n_k c_k /
n, the mean of everybody's; and c less the sampled clients' mean of old c_i is added to Delta (as in
FedVARP, Jhunjhunwala et al. 2022).

On the client (`local.control`) they are SCAFFOLD's (Karimireddy et al. 2020): c - c_i is added to
every gradient; c_i' is the mean of the gradients as they were without it, which for plain SGD is
the paper's option II, c_i - c + (w - w_i) / (s_i local_lr), and unlike it holds for any optimizer;
c' = c + sum (c_i' - c_i) / K.

c_i lives in a file of client i's; only sums over clients pass between slots. The exchange weighs
all that a client adds by its weight n_i, so what is weighed otherwise is divided by it first.
"""

from dataclasses import dataclass

import torch

from hpcfed.adapters.layout import Part
from hpcfed.round import Outcome
from hpcfed.server.memory import Memory
from hpcfed.settings.config import Config


@dataclass(frozen=True)
class Sampled:
    """Those clients of a round that did not fail, in numbers; and of the whole federation.
    weight: the sum of their weights in the exchange, n_S."""

    clients: int
    weight: int
    steps: int
    all_clients: int
    all_rows: int


class Variates:
    """None: the base of the others.

    sums: vectors (n,) that a client adds to the exchange besides its values. travels: of them, what
    a client must really send, and get; the others the server could compute. keeps: whether each
    client has a c_i.
    """

    sums = 0
    travels = 0
    keeps = False

    def __init__(self, config: Config, memory: Memory) -> None:
        self._memory, self._local_lr = memory, config.local.lr

    def correction(self, shared: Part, variate: torch.Tensor | None) -> torch.Tensor | None:
        """(size,), added to a client's gradients. variate: its c_i (size,), None at first."""
        return None

    def message(
        self, shared: Part, w: torch.Tensor, outcome: Outcome, c_i: torch.Tensor, weight: int
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """What a client adds, `sums` vectors (n,), and its new c_i (n,). w (n,): handed out."""
        return [], None

    def update(
        self, shared: Part, delta: torch.Tensor, means: list[torch.Tensor], sampled: Sampled
    ) -> torch.Tensor:
        """Bring c up to date; returns the control term (n,) of the server step. delta (n,): w -
        wbar. means: of what the clients added."""
        return torch.zeros_like(delta)


class Scaffold(Variates):
    """SCAFFOLD's, on the client."""

    sums = travels = 1
    keeps = True

    def correction(self, shared: Part, variate: torch.Tensor | None) -> torch.Tensor | None:
        """c - c_i; zero where nothing is shared."""
        control = self._memory.get("control", shared)
        if variate is not None:
            control = control - shared.pack(variate)
        return self._memory.spread(control, shared)

    def message(
        self, shared: Part, w: torch.Tensor, outcome: Outcome, c_i: torch.Tensor, weight: int
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        assert outcome.gradient is not None
        after = shared.pack(outcome.gradient)
        return [(after - c_i) / weight], after

    def update(
        self, shared: Part, delta: torch.Tensor, means: list[torch.Tensor], sampled: Sampled
    ) -> torch.Tensor:
        c = self._memory.get("control", shared)
        moved = means[0] * (sampled.weight / sampled.all_clients)
        self._memory.set("control", shared, c + moved)
        return torch.zeros_like(delta)


class LastUpdates(Variates):
    """For plain momentum, on the server: c_i is a client's last update."""

    sums = 1
    keeps = True

    def message(
        self, shared: Part, w: torch.Tensor, outcome: Outcome, c_i: torch.Tensor, weight: int
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        assert outcome.values is not None
        return [c_i], w - shared.pack(outcome.values)

    def update(
        self, shared: Part, delta: torch.Tensor, means: list[torch.Tensor], sampled: Sampled
    ) -> torch.Tensor:
        c, old = self._memory.get("control", shared), means[0]
        fraction = sampled.weight / sampled.all_rows
        self._memory.set("control", shared, c + fraction * (delta - old))
        return c - old


class Published(Variates):
    """For momentum of differences, on the server: FedPepTAO's."""

    sums = 2
    keeps = True

    def message(
        self, shared: Part, w: torch.Tensor, outcome: Outcome, c_i: torch.Tensor, weight: int
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        assert outcome.values is not None
        c, steps = self._memory.get("control", shared), outcome.steps
        after = c_i - c + (w - shared.pack(outcome.values)) / (steps * self._local_lr)
        return [(after - c_i) * (steps / weight), after], after

    def update(
        self, shared: Part, delta: torch.Tensor, means: list[torch.Tensor], sampled: Sampled
    ) -> torch.Tensor:
        moved, after = means[0] * (sampled.weight / sampled.steps), means[1]
        c = self._memory.get("control", shared)
        c = c + (sampled.clients / sampled.all_clients) * moved
        self._memory.set("control", shared, c)
        return c - after


def configured(config: Config) -> type[Variates]:
    """The class that a configuration asks for."""
    if config.local.control:
        return Scaffold
    if not config.server.control:
        return Variates
    return Published if config.server.gradient == "difference" else LastUpdates
