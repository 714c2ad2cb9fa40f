"""The server's side of a round: optimizers and control variates, on flat tensors, the same on every
rank. What a client adds to the exchange, and what the server makes of the sums.

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

from dataclasses import dataclass, field

import torch

from hpcfed.settings.config import Config, Server

LEAST_LR = 1e-4  # where server.lr_decay ends


@dataclass(frozen=True)
class Message:
    """A client's part of the exchange: its values and what else is summed, end to end, and its
    control variate after the round."""

    packed: torch.Tensor
    control: torch.Tensor | None = None


@dataclass(frozen=True)
class Sampled:
    """Those clients of a round that did not fail, in numbers."""

    clients: int
    rows: int
    steps: int


@dataclass
class ServerState:
    """All that passes from one round to the next, besides the values: (n,) each, and the rate."""

    lr: float
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def get(self, name: str, like: torch.Tensor, start: float = 0.0) -> torch.Tensor:
        """A tensor by name; at first `start` everywhere."""
        return self.tensors.get(name, torch.full_like(like, start))


class Optimizer:
    """The configured server step. `clients`, `rows`: of the whole federation."""

    def __init__(self, config: Config, clients: int, rows: int) -> None:
        self._spec: Server = config.server
        self._local_lr = config.local.lr
        self._clients, self._rows = clients, rows
        self.scaffold = config.local.control
        self.published = config.server.gradient == "difference"
        self.state = ServerState(config.server.lr)

    @property
    def keeps(self) -> bool:
        """Whether each client has a control variate."""
        return self.scaffold or self._spec.control

    @property
    def extras(self) -> int:
        """How many vectors (n,) a client adds to the exchange beside its values."""
        if self.scaffold or (self._spec.control and not self.published):
            return 1
        return 2 if self._spec.control else 0

    def correction(self, own: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
        """(n,) c - c_i, which a client adds to its gradients."""
        if not self.scaffold:
            return None
        control = self.state.get("control", like)
        return control if own is None else control - own

    def message(
        self,
        w: torch.Tensor,
        w_i: torch.Tensor,
        own: torch.Tensor | None,
        rows: int,
        steps: int,
        gradient: torch.Tensor | None,
    ) -> Message:
        """What a client sends. w, w_i (n,). own: its control variate, None before its first round.
        gradient: (n,) the mean over its steps, for SCAFFOLD."""
        if not self.keeps:
            return Message(w_i)
        before = torch.zeros_like(w) if own is None else own
        # The exchange weighs all by n_i, so what is weighed otherwise is divided by it here.
        if self.scaffold:
            assert gradient is not None
            return Message(torch.cat([w_i, (gradient - before) / rows]), gradient)
        if not self.published:
            return Message(torch.cat([w_i, before]), w - w_i)
        c = self.state.get("control", w)
        after = before - c + (w - w_i) / (steps * self._local_lr)
        return Message(torch.cat([w_i, (after - before) * (steps / rows), after]), after)

    def step(self, w: torch.Tensor, means: torch.Tensor, sampled: Sampled) -> torch.Tensor:
        """(n,) the next round's values, from those handed out (n,) and the exchange's n_i-weighted
        means ((1 + extras) * n,). Nothing changes if every client failed."""
        if not sampled.clients:
            return w
        wbar, *extras = torch.split(means, len(w))
        control = self._control(w, wbar, extras, sampled)
        name = self._spec.optimizer
        if name == "mean":
            return wbar.clone()
        if name in ("adam", "yogi"):
            return self._adaptive(w, wbar)
        if self.published:
            return self._difference(w, wbar, control)
        return self._momentum(w, wbar, control)

    def _control(
        self, w: torch.Tensor, wbar: torch.Tensor, extras: list[torch.Tensor], sampled: Sampled
    ) -> torch.Tensor:
        """Bring c up to date; returns the control term (n,) of the server step."""
        c = self.state.get("control", w)
        if not self.keeps:
            return c
        if self.scaffold:
            self.state.tensors["control"] = c + extras[0] * (sampled.rows / self._clients)
            return torch.zeros_like(w)
        if not self.published:
            old = extras[0]
            share = sampled.rows / self._rows
            self.state.tensors["control"] = c + share * (w - wbar - old)
            return c - old
        moved, after = extras[0] * (sampled.rows / sampled.steps), extras[1]
        c = c + (sampled.clients / self._clients) * moved
        self.state.tensors["control"] = c
        return c - after

    def _momentum(self, w: torch.Tensor, wbar: torch.Tensor, control: torch.Tensor) -> torch.Tensor:
        delta = w - wbar
        rest = self._spec.momentum * self.state.get("momentum", w) + control
        v = rest + delta
        self.state.tensors["momentum"] = v
        # w - lr v, written so that without momentum, control and rate it is wbar to the last bit.
        return wbar - rest - (self._rate() - 1) * v

    def _difference(
        self, w: torch.Tensor, wbar: torch.Tensor, control: torch.Tensor
    ) -> torch.Tensor:
        delta, before = w - wbar, self.state.tensors.get("delta")
        self.state.tensors["delta"] = delta
        if before is None:  # no server step in the first round
            return wbar.clone()
        beta = self._spec.momentum
        v = beta * self.state.get("momentum", w) + (1 - beta) * (before - delta) + control
        self.state.tensors["momentum"] = v
        return wbar - self._rate() * v

    def _adaptive(self, w: torch.Tensor, wbar: torch.Tensor) -> torch.Tensor:
        spec, delta = self._spec, w - wbar
        u = spec.momentum * self.state.get("momentum", w) + (1 - spec.momentum) * delta
        r = self.state.get("second", w, spec.tau**2)
        square = delta.square()
        if spec.optimizer == "adam":
            r = spec.beta2 * r + (1 - spec.beta2) * square
        else:
            r = r - (1 - spec.beta2) * square * (r - square).sign()
        self.state.tensors["momentum"], self.state.tensors["second"] = u, r
        return w - self._rate() * u / (r.sqrt() + spec.tau)

    def _rate(self) -> float:
        """The rate of this round; decays for the next."""
        now = self.state.lr
        self.state.lr = max(now * self._spec.lr_decay, min(now, LEAST_LR))
        return now
