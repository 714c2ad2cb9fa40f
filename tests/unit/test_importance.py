"""Per-sample gradients and worst-case noise against obvious versions, without an engine."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hpcfed.adapters.prompts import Copies
from hpcfed.importance.eigenvalues import cosines, eigenvalue_score
from hpcfed.importance.fisher import FisherSums, PerSampleGradients
from hpcfed.importance.sensitivity import (
    RADIUS,
    BlockWatch,
    relative_change,
    worst_case_noise,
)


class Twice(nn.Module):
    """Uses one linear layer twice, optionally under checkpointing; samples first."""

    def __init__(self, recompute=False):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 6, bias=False)
        self.shared = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)
        self.recompute = recompute

    def middle(self, x):
        return torch.tanh(self.shared(torch.tanh(self.shared(x))))

    def forward(self, x):
        hidden = self.first(x)
        if self.recompute:
            hidden = checkpoint(self.middle, hidden, use_reentrant=False)
        else:
            hidden = self.middle(hidden)
        return self.head(hidden.mean(1)).square().sum(1)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_module_used_twice_and_recomputed(recompute):
    network = Twice(recompute)
    linears = [network.first, network.shared, network.head]
    taps = PerSampleGradients(linears)
    sums = FisherSums([1, 0, None], torch.device("cpu"))
    x = torch.randn(4, 3, 5)
    scale = 0.25
    for _ in range(2):  # the second pass must not remember the first
        taps.listen(sums)
        sums.batch(4, scale)
        loss = network(x).sum() * scale
        taps.end_forward()
        loss.backward()
    taps.listen(None)
    columns, rows, wanted = torch.zeros(5), torch.zeros(6), []
    for sample in x:
        loss = network(sample[None]).sum()
        first, shared, *rest = torch.autograd.grad(loss, list(network.parameters()))
        wanted.append(sum((g.square().sum() for g in (first, shared, *rest)), torch.zeros(())))
        columns += 2 * first.square().sum(0)
        rows += 2 * shared.square().sum(1)
    assert torch.allclose(sums.trace, torch.stack(wanted), rtol=1e-5)
    by_column, by_row, nothing = sums.neurons
    assert by_column is not None and torch.allclose(by_column, columns, rtol=1e-5)
    assert by_row is not None and torch.allclose(by_row, rows, rtol=1e-5)
    assert nothing is None


def test_silent_hooks_change_no_gradient():
    found = []
    for listening in (False, True):
        network = Twice()
        taps = PerSampleGradients([network.first, network.shared, network.head])
        if listening:
            taps.listen(lambda *_: None)
        loss = network(torch.ones(2, 3, 5)).sum()
        taps.end_forward()
        loss.backward()
        found.append([p.grad for p in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_noise_of_a_linear_loss_is_known():
    """loss = w . e: in the 2-ball the worst noise is eps w / ||w||; in every p-ball it has norm
    eps, and no other noise of that norm raises the loss more."""
    torch.manual_seed(1)
    e, w = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    mask = torch.ones(3, 4)
    eps = RADIUS * e.flatten(1).norm(dim=1)
    two = worst_case_noise(e, w, mask)
    unit = w / w.flatten(1).norm(dim=1)[:, None, None]
    assert torch.allclose(two, eps[:, None, None] * unit, atol=1e-6)
    for p in (1.5, 2.0, 4.0):
        worst = worst_case_noise(e, w, mask, p)
        assert torch.allclose(worst.flatten(1).norm(p=p, dim=1), eps, rtol=1e-4)
        best = (worst * w).sum((1, 2))
        for _ in range(50):
            other = torch.randn(3, 4, 5)
            other *= (eps / other.flatten(1).norm(p=p, dim=1))[:, None, None]
            assert ((other * w).sum((1, 2)) <= best + 1e-5).all()


def test_noise_keeps_off_padding_and_bears_a_zero_gradient():
    torch.manual_seed(2)
    e, g = torch.randn(2, 4, 3), torch.randn(2, 4, 3) * 1e-20
    g[1] = 0
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    noise = worst_case_noise(e, g, mask)
    assert not noise[0, 2:].any() and not noise[1].any()
    assert noise[0].norm() == pytest.approx(RADIUS * float(e[0, :2].norm()), rel=1e-5)
    short = worst_case_noise(e[:1, :2], g[:1, :2], mask[:1, :2])
    assert torch.allclose(short, noise[:1, :2])


class Stack(nn.Module):
    """Linear blocks of known gain; the input has a position of padding."""

    def __init__(self, gains):
        super().__init__()
        blocks = [nn.Linear(4, 4, bias=False) for _ in gains]
        self.blocks = nn.ModuleList(blocks)
        for block, gain in zip(blocks, gains, strict=True):
            nn.init.orthogonal_(block.weight)
            block.weight.data *= gain

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_linear_layers_with_a_known_answer():
    """Orthogonal blocks keep the ratio ||delta|| / ||e|| = 0.05 at every depth, whatever their
    gain; what lies in the padding changes nothing."""
    torch.manual_seed(3)
    network = Stack([2.0, 0.1, 30.0])
    watch = BlockWatch(list(network.blocks))
    x, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 1, 1]])
    with watch.watch():
        loss = (network(x) * mask[..., None]).square().sum()
        clean, entered = watch.left, watch.entered
        assert entered is not None
        (gradient,) = torch.autograd.grad(loss, entered)
    noise = worst_case_noise(entered, gradient, mask)
    found = []
    for padding in (0.0, 1e3):
        moved = x.clone().detach()
        moved[0, 2] = padding
        with torch.no_grad(), watch.watch(noise):
            network(moved)
            found.append(relative_change(clean, watch.left, mask))
    assert torch.allclose(found[0], torch.full((2, 3), RADIUS), rtol=1e-4)
    assert torch.equal(*found)
    assert not watch.left and watch.entered is None, "nothing is kept alive"


def test_the_eigenvalue_score_against_numpy():
    """Outputs of different lengths: padding counts for nothing, wherever it lies."""
    rng = np.random.default_rng(0)
    for samples in (1, 2, 5, 8):
        outputs = rng.normal(size=(samples, 6, 4)).astype(np.float32)
        lengths = rng.integers(1, 7, samples)
        mask = np.arange(6) < lengths[:, None]
        flat = (outputs * mask[:, :, None]).reshape(samples, -1).astype(np.float64)
        c = np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a in flat] for b in flat])
        lam = np.maximum(np.linalg.eigvals(c).real, 0) + 1e-5
        wanted = float(np.sum(np.log(lam) + 1 / lam))
        found = cosines(torch.from_numpy(outputs), torch.from_numpy(mask))
        assert np.allclose(found.numpy(), c)
        assert eigenvalue_score(found) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("samples", [1, 2, 8])
def test_the_eigenvalue_score_bears_samples_that_are_the_same(samples):
    same = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0)).expand(samples, 3, 4)
    found = eigenvalue_score(cosines(same, torch.ones(samples, 3)))
    wanted = math.log(samples) + 1 / samples + (samples - 1) * (math.log(1e-5) + 1e5)
    assert found == pytest.approx(wanted, rel=1e-3)
    assert math.isfinite(eigenvalue_score(cosines(same * 0, torch.ones(samples, 3))))


def test_alike_samples_score_higher():
    torch.manual_seed(0)
    apart, mask = torch.randn(5, 3, 8), torch.ones(5, 3)
    alike = apart[:1] + 0.1 * apart
    assert eigenvalue_score(cosines(alike, mask)) > eigenvalue_score(cosines(apart, mask))


def test_a_copys_gradient_is_its_samples():
    copies = Copies((3, 2, 4), torch.float32)
    nn.init.normal_(copies.weight)
    taps = PerSampleGradients([copies])
    sums = FisherSums([0], torch.device("cpu"))
    x = torch.randn(5, 3, 2, 4)
    taps.listen(sums)
    sums.batch(5, 1.0)
    loss = (copies(torch.zeros(5, requires_grad=True)) * x).square().sum()
    taps.end_forward()
    loss.backward()
    gradients = 2 * copies.weight.detach() * x.square()
    assert torch.allclose(sums.trace, gradients.square().flatten(1).sum(1))
    (found,) = sums.neurons
    assert found is not None and torch.allclose(found, gradients.square().sum((0, 2, 3)))
