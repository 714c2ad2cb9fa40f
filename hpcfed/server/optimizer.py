"""The server's side of a round: optimizers and control variates, on flat tensors, the same on every
rank. What a client adds to the exchange, and what the server makes of the sums.

What is remembered, here and by clients, has a place for every trainable value, so what is shared
may change from round to round: vectors (size,) are layout.size long, packed ones (n,) hold the
values of the round's shared blocks, and only those travel.

w: what the server handed out, w_i: what client i returns after s_i steps, with n_i rows; wbar =
sum n_i w_i / n_S; Delta = w - wbar, the pseudo-gradient. m of K clients, n of all rows.

mean          w' = wbar                                   FedAvg, McMahan et al. 2017
momentum      v' = b v + Delta;  w' = w - lr v'           FedAvgM, Hsu et al. 2019
difference    v' = b v + (1-b) (Delta_before - Delta);  w' = wbar - lr v'        FedPepTAO's code
adam, yogi    u' = b u + (1-b) Delta;  w' = w - lr u' / (sqrt(r') + tau)  Reddi et al. 2021

Control variates on the server (`server.control`) make up for the clients that were not sampled.
In `difference` they are FedPepTAO's: c_i' = c_i - c + (w - w_i) / (s_i local_lr), c' = c + m/K sum
s_i/s_S (c_i' - c_i), and the n_i-weighted mean of c' - c_i' is added to v'. In `momentum` they are
our reading, which keeps to one unit: c_i' = w - w_i, a client's last update; c = sum n_k c_k / n,
the mean of everybody's; and c less the sampled clients' mean of old c_i is added to Delta (as in
FedVARP, Jhunjhunwala et al. 2022).

Control variates on the client (`local.control`) are SCAFFOLD's (Karimireddy et al. 2020): c - c_i
is added to every gradient; c_i' is the mean of the gradients as they were without it, which for
plain SGD is the paper's option II, c_i - c + (w - w_i) / (s_i local_lr), and unlike it holds for
any optimizer; c' = c + sum (c_i' - c_i) / K.

c_i lives in a file of client i's; only sums over clients pass between slots.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch

from hpcfed.adapters.layout import AdapterLayout
from hpcfed.round import Outcome
from hpcfed.settings.config import Config, Server
from hpcfed.state import ServerState

LEAST_LR = 1e-4  # where server.lr_decay ends


@dataclass(frozen=True)
class Sampled:
    """Those clients of a round that did not fail, in numbers."""

    clients: int
    rows: int
    steps: int


def vectors(config: Config) -> int:
    """How many vectors (n,) a client adds to the exchange: its values, and control variates."""
    if config.local.control:
        return 2
    if not config.server.control:
        return 1
    return 3 if config.server.gradient == "difference" else 2


class Optimizer:
    """The configured server step. `clients`, `rows`: of the whole federation."""

    def __init__(
        self, config: Config, layout: AdapterLayout, state: ServerState, clients: int, rows: int
    ) -> None:
        self._spec: Server = config.server
        self._local_lr = config.local.lr
        self._clients, self._rows = clients, rows
        self._layout, self._state = layout, state
        self.scaffold = config.local.control
        self._differences = config.server.gradient == "difference"

    @property
    def keeps(self) -> bool:
        """Whether each client has a control variate."""
        return self.scaffold or self._spec.control

    def _get(self, name: str, shared: Collection[str], start: float = 0.0) -> torch.Tensor:
        """(n,) of what is remembered; at first `start` everywhere."""
        vector = self._state.vectors.get(name)
        if vector is None:
            return torch.full((self._layout.count(shared),), start)
        return self._layout.pack(vector, shared)

    def _set(
        self, name: str, shared: Collection[str], packed: torch.Tensor, start: float = 0.0
    ) -> None:
        before = self._state.vectors.get(name)
        self._state.vectors[name] = self._spread(packed, shared, before, start)

    def _spread(
        self,
        packed: torch.Tensor,
        shared: Collection[str],
        before: torch.Tensor | None = None,
        start: float = 0.0,
    ) -> torch.Tensor:
        """(size,): packed values at their places, elsewhere those of before, or `start`."""
        vector = torch.full((self._layout.size,), start) if before is None else before.clone()
        self._layout.unpack(packed, shared, vector)
        return vector

    def correction(
        self, shared: Collection[str], variate: torch.Tensor | None
    ) -> torch.Tensor | None:
        """(size,) c - c_i, which a client adds to its gradients; zero where nothing is shared.
        variate: its control variate (size,), None before its first round."""
        if not self.scaffold:
            return None
        control = self._get("control", shared)
        if variate is not None:
            control = control - self._layout.pack(variate, shared)
        return self._spread(control, shared)

    def message(
        self,
        shared: Collection[str],
        w: torch.Tensor,
        outcome: Outcome,
        variate: torch.Tensor | None,
        rows: int,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What a client sends, its values and what else is summed, end to end (vectors * n,);
        and its control variate after the round (size,), if it has one.

        w (size,): what the server handed out. variate: as in `correction`.
        """
        assert outcome.values is not None
        w_i = self._layout.pack(outcome.values, shared)
        if not self.keeps:
            return w_i, None
        w = self._layout.pack(w, shared)
        before = torch.zeros_like(w) if variate is None else self._layout.pack(variate, shared)
        # The exchange weighs all by n_i, so what is weighed otherwise is divided by it here.
        if self.scaffold:
            assert outcome.gradient is not None
            after = self._layout.pack(outcome.gradient, shared)
            sent = [w_i, (after - before) / rows]
        elif not self._differences:
            after = w - w_i
            sent = [w_i, before]
        else:
            c, steps = self._get("control", shared), outcome.steps
            after = before - c + (w - w_i) / (steps * self._local_lr)
            sent = [w_i, (after - before) * (steps / rows), after]
        return torch.cat(sent), self._spread(after, shared, variate)

    def step(
        self, shared: Collection[str], w: torch.Tensor, means: torch.Tensor, sampled: Sampled
    ) -> torch.Tensor:
        """(n,) the next round's values of the shared blocks, from those handed out (size,) and the
        exchange's n_i-weighted means (vectors * n,). Nothing changes if every client failed.
        """
        w = self._layout.pack(w, shared)
        if not sampled.clients:
            return w
        wbar, *extras = torch.split(means, len(w))
        control = self._control(shared, w, wbar, extras, sampled)
        name = self._spec.optimizer
        if name == "mean":
            return wbar.clone()
        if name in ("adam", "yogi"):
            return self._adaptive(shared, w, wbar)
        if self._differences:
            return self._difference(shared, w, wbar, control)
        return self._momentum(shared, w, wbar, control)

    def _control(
        self,
        shared: Collection[str],
        w: torch.Tensor,
        wbar: torch.Tensor,
        extras: list[torch.Tensor],
        sampled: Sampled,
    ) -> torch.Tensor:
        """Bring c up to date; returns the control term (n,) of the server step."""
        if not self.keeps:
            return torch.zeros_like(w)
        c = self._get("control", shared)
        if self.scaffold:
            self._set("control", shared, c + extras[0] * (sampled.rows / self._clients))
            return torch.zeros_like(w)
        if not self._differences:
            old = extras[0]
            fraction = sampled.rows / self._rows
            self._set("control", shared, c + fraction * (w - wbar - old))
            return c - old
        moved, after = extras[0] * (sampled.rows / sampled.steps), extras[1]
        c = c + (sampled.clients / self._clients) * moved
        self._set("control", shared, c)
        return c - after

    def _momentum(
        self, shared: Collection[str], w: torch.Tensor, wbar: torch.Tensor, control: torch.Tensor
    ) -> torch.Tensor:
        delta = w - wbar
        rest = self._spec.momentum * self._get("momentum", shared) + control
        v = rest + delta
        self._set("momentum", shared, v)
        # w - lr v, written so that without momentum, control and rate it is wbar to the last bit.
        return wbar - rest - (self._rate() - 1) * v

    def _difference(
        self, shared: Collection[str], w: torch.Tensor, wbar: torch.Tensor, control: torch.Tensor
    ) -> torch.Tensor:
        delta, first = w - wbar, "delta" not in self._state.vectors
        before = self._get("delta", shared)
        self._set("delta", shared, delta)
        if first:  # no server step in the first round
            return wbar.clone()
        beta = self._spec.momentum
        v = beta * self._get("momentum", shared) + (1 - beta) * (before - delta) + control
        self._set("momentum", shared, v)
        return wbar - self._rate() * v

    def _adaptive(
        self, shared: Collection[str], w: torch.Tensor, wbar: torch.Tensor
    ) -> torch.Tensor:
        spec, delta = self._spec, w - wbar
        u = spec.momentum * self._get("momentum", shared) + (1 - spec.momentum) * delta
        start = spec.tau**2
        r = self._get("second", shared, start)
        square = delta.square()
        if spec.optimizer == "adam":
            r = spec.beta2 * r + (1 - spec.beta2) * square
        else:
            r = r - (1 - spec.beta2) * square * (r - square).sign()
        self._set("momentum", shared, u)
        self._set("second", shared, r, start)
        return w - self._rate() * u / (r.sqrt() + spec.tau)

    def _rate(self) -> float:
        """The rate of this round; decays for the next."""
        now = self._state.lr
        self._state.lr = max(now * self._spec.lr_decay, min(now, LEAST_LR))
        return now
