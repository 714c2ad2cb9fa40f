"""Server steps against the published formulas, written out client by client."""

import numpy as np
import pytest
import torch

from hpcfed.adapters.layout import AdapterLayout
from hpcfed.round import Outcome
from hpcfed.server.optimizer import Optimizer
from hpcfed.server.variates import Sampled
from hpcfed.settings.config import Config, Local, Server
from hpcfed.state import ServerState

SIZE, CLIENTS, LOCAL_LR = 7, 6, 0.3
ROWS = (5, 9, 2, 7, 4, 3)  # of each client
# Around the shared block lie others, whose values must stay out of it.
LAYOUT = AdapterLayout.build(
    [(block, "prompt", block, (size,), None) for block, size in (("0", 3), ("1", SIZE), ("2", 2))]
)
SHARED = LAYOUT.part(("1",))


def make(**server):
    control = server.pop("local_control", False)
    config = Config(server=Server(**server), local=Local(lr=LOCAL_LR, control=control))
    state = ServerState(config.server.lr)
    return Optimizer(config, LAYOUT, state)


def spread(packed):
    """(LAYOUT.size,): these values in the shared block, others elsewhere."""
    vector = torch.full((LAYOUT.size,), 7.0)
    SHARED.unpack(packed, vector)
    return vector


class Slow:
    """A federation whose clients return given values; what is kept per client is a dictionary."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.kept = {}
        self.w = torch.zeros(SIZE)

    def round(self, updates, gradients=None):
        """updates: client -> (values it returns, steps). The exchange, as the collective does it:
        n_i-weighted means, in float64."""
        total = torch.zeros(SIZE * (1 + self.optimizer.variates.sums), dtype=torch.float64)
        after = {}
        for k, (values, steps) in updates.items():
            outcome = Outcome(spread(values), steps=steps)
            if gradients is not None:
                outcome.gradient = spread(gradients[k])
            sent, kept = self.optimizer.message(
                SHARED, spread(self.w), outcome, self.kept.get(k), ROWS[k]
            )
            total += ROWS[k] * torch.cat([values, *sent]).double()
            if kept is not None:
                after[k] = kept
        rows = sum(ROWS[k] for k in updates)
        taken = sum(steps for _, steps in updates.values())
        sampled = Sampled(len(updates), rows, taken, CLIENTS, sum(ROWS))
        means = (total / max(rows, 1)).float()
        self.w = self.optimizer.step(SHARED, spread(self.w), means, sampled)
        self.kept |= after

    @property
    def controls(self):
        """Client -> its control variate (SIZE,); where nothing is shared it is zero."""
        for vector in self.kept.values():
            assert len(vector) == LAYOUT.size and not vector[:3].any() and not vector[-2:].any()
        return {k: SHARED.pack(vector) for k, vector in self.kept.items()}

    def remembered(self, name):
        """(SIZE,) of what the server keeps."""
        return self.optimizer._memory.get(name, SHARED)


def rounds(seed=0, number=5):
    """Partial participation with unequal steps: round -> client -> (values, steps)."""
    rng = np.random.default_rng(seed)
    for _ in range(number):
        sampled = sorted(rng.choice(CLIENTS, 3, replace=False).tolist())
        yield {
            k: (torch.from_numpy(rng.normal(size=SIZE)).float(), int(rng.integers(1, 9)))
            for k in sampled
        }


def mean(updates):
    rows = sum(ROWS[k] for k in updates)
    return sum(ROWS[k] * v.double() for k, (v, _) in updates.items()) / rows


def close(found, wanted):
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_without_momentum_and_control_the_momentum_step_is_the_plain_mean_bit_for_bit():
    plain, momentum = Slow(make()), Slow(make(optimizer="momentum", momentum=0.0))
    for updates in rounds():
        plain.round(updates)
        momentum.round(updates)
        assert torch.equal(plain.w, momentum.w)
        close(plain.w, mean(updates))


def test_momentum_is_fedavgm():
    slow = Slow(make(optimizer="momentum", momentum=0.7, lr=0.5))
    w, v = torch.zeros(SIZE).double(), torch.zeros(SIZE).double()
    for updates in rounds():
        v = 0.7 * v + (w - mean(updates))
        w = w - 0.5 * v
        slow.round(updates)
        close(slow.w, w)


@pytest.mark.parametrize("name", ["adam", "yogi"])
def test_adam_and_yogi_are_those_of_fedopt(name):
    slow = Slow(make(optimizer=name, momentum=0.8, beta2=0.95, tau=0.01, lr=0.1))
    w, m = torch.zeros(SIZE).double(), torch.zeros(SIZE).double()
    v = torch.full((SIZE,), 0.01**2).double()
    for updates in rounds():
        delta = mean(updates) - w  # Reddi et al. 2021, algorithm 2: added, not subtracted
        m = 0.8 * m + 0.2 * delta
        if name == "adam":
            v = 0.95 * v + 0.05 * delta**2
        else:
            v = v - 0.05 * delta**2 * torch.sign(v - delta**2)
        w = w + 0.1 * m / (v.sqrt() + 0.01)
        slow.round(updates)
        close(slow.w, w)


@pytest.mark.parametrize("control", [True, False])
def test_difference_is_the_published_loop_over_clients(control):
    slow = Slow(
        make(
            optimizer="momentum", gradient="difference", control=control, lr=0.05, lr_decay=0.99,
            momentum=0.9,
        )
    )  # fmt: skip
    zero = torch.zeros(SIZE).double()
    w, v, c, lr, before = zero, zero, zero, 0.05, None
    controls = dict.fromkeys(range(CLIENTS), zero)
    for updates in rounds():
        wbar = mean(updates)
        rows, steps = sum(ROWS[k] for k in updates), sum(s for _, s in updates.values())
        new = {k: controls[k] - c + (w - own) / (s * LOCAL_LR) for k, (own, s) in updates.items()}
        moved = sum(s / steps * (new[k] - controls[k]) for k, (_, s) in updates.items())
        c = c + len(updates) / CLIENTS * moved
        controls |= new
        delta = w - wbar
        if before is None:
            w = wbar
        else:
            g = before - delta
            each = {k: 0.9 * v + 0.1 * g + (c - new[k] if control else zero) for k in updates}
            w = sum(ROWS[k] / rows * (wbar - lr * each[k]) for k in updates)
            v = sum(ROWS[k] / rows * each[k] for k in updates)
            lr = max(0.99 * lr, 1e-4)
        before = delta
        slow.round(updates)
        close(slow.w, w)


def test_server_control_stands_in_for_the_clients_that_were_not_sampled():
    slow = Slow(make(optimizer="momentum", momentum=0.5, control=True))
    zero = torch.zeros(SIZE).double()
    w, v = zero, zero
    last = dict.fromkeys(range(CLIENTS), zero)  # each client's last update
    for updates in rounds():
        rows = sum(ROWS[k] for k in updates)
        everyone = sum(ROWS[k] * last[k] for k in last) / sum(ROWS)
        fresh = sum(ROWS[k] * ((w - own) - last[k]) for k, (own, _) in updates.items()) / rows
        v = 0.5 * v + fresh + everyone
        last |= {k: w - own.double() for k, (own, _) in updates.items()}
        w = w - v
        slow.round(updates)
        close(slow.w, w)


def test_server_control_changes_nothing_when_everybody_takes_part():
    plain = Slow(make(optimizer="momentum"))
    control = Slow(make(optimizer="momentum", control=True))
    rng = np.random.default_rng(3)
    for _ in range(4):
        updates = {k: (torch.from_numpy(rng.normal(size=SIZE)).float(), 3) for k in range(CLIENTS)}
        plain.round(updates)
        control.round(updates)
        torch.testing.assert_close(plain.w, control.w, rtol=1e-4, atol=1e-4)


def test_scaffold_is_the_published_loop_over_clients():
    slow = Slow(make(local_control=True))
    zero = torch.zeros(SIZE).double()
    w, c = zero, zero
    controls = dict.fromkeys(range(CLIENTS), zero)
    rng = np.random.default_rng(5)
    for updates in rounds():
        gradients = {k: torch.from_numpy(rng.normal(size=SIZE)).float() for k in updates}
        for k in updates:
            correction = slow.optimizer.variates.correction(SHARED, slow.kept.get(k))
            close(SHARED.pack(correction), c - controls[k])
            assert not LAYOUT.part(("0", "2")).pack(correction).any()
        c = c + sum(gradients[k].double() - controls[k] for k in updates) / CLIENTS
        controls |= {k: g.double() for k, g in gradients.items()}
        w = mean(updates)
        slow.round(updates, gradients)
        close(slow.w, w)


def test_after_a_full_round_from_zero_c_is_the_mean_of_the_clients():
    updates = {k: next(iter(rounds(seed=k, number=1))) for k in range(CLIENTS)}
    updates = {k: (next(iter(own.values()))[0], k + 1) for k, own in updates.items()}
    slow = Slow(make(optimizer="momentum", gradient="difference", control=True))
    slow.round(updates)
    steps = sum(s for _, s in updates.values())
    wanted = sum(s * slow.controls[k].double() for k, (_, s) in updates.items()) / steps
    close(slow.remembered("control"), wanted)
    slow = Slow(make(optimizer="momentum", control=True))
    slow.round(updates)
    wanted = sum(ROWS[k] * slow.controls[k].double() for k in updates) / sum(ROWS)
    close(slow.remembered("control"), wanted)


@pytest.mark.parametrize("options", [{}, {"optimizer": "adam"}, {"optimizer": "momentum"}])
def test_a_round_in_which_every_client_failed_changes_nothing(options):
    slow = Slow(make(**options))
    for updates in rounds(number=2):
        slow.round(updates)
    vectors_now = slow.optimizer._memory._state.vectors
    before, state = slow.w.clone(), {k: v.clone() for k, v in vectors_now.items()}
    slow.round({})
    assert torch.equal(slow.w, before)
    assert all(torch.equal(v, state[k]) for k, v in vectors_now.items())


def test_the_rate_decays_to_its_floor():
    slow = Slow(make(optimizer="momentum", lr=1e-3, lr_decay=0.1, momentum=0.0))
    rates = []
    for updates in rounds():
        before = slow.w.double()
        slow.round(updates)
        rates.append(float(((before - slow.w.double()) / (before - mean(updates))).mean()))
    assert rates == pytest.approx([1e-3, 1e-4, 1e-4, 1e-4, 1e-4], rel=0.05)


def test_what_is_shared_may_change():
    """What is remembered of a block waits while it is not shared."""
    server = make(optimizer="momentum", momentum=0.5)
    state = server._memory._state
    w, sampled = torch.zeros(LAYOUT.size), Sampled(2, 9, 4, CLIENTS, sum(ROWS))
    for shared in (("0", "1"), ("1", "2"), ("0",)):
        before = dict(state.vectors)
        part = LAYOUT.part(shared)
        part.unpack(server.step(part, w, torch.ones(part.size), sampled), w)
        for block in LAYOUT.blocks:
            span = LAYOUT.span(block)
            if before and block not in shared:
                assert torch.equal(state.vectors["momentum"][span], before["momentum"][span])
    momentum = state.vectors["momentum"]
    assert set(momentum[LAYOUT.span("2")].tolist()) == {-1.0}  # shared once, from nothing
    assert set(momentum[LAYOUT.span("0")].tolist()) == {-0.5}  # -1, then half of it and no more
