"""Clipping, noise, keys and the accountant, against the formula and the library."""

import functools
import hashlib
import math

import numpy as np
import pytest
import torch

from hpcfed.errors import UserError
from hpcfed.policies import sampling
from hpcfed.privacy import accountant, mechanism, samples, streams
from hpcfed.rounds import preflight
from hpcfed.settings.resolve import resolve
from hpcfed.storage import secret
from tests.mpi.reference_dpsgd import clipped_sum, gradient_of

KEY = bytes(range(32))
NUMBERS = 200_000


def test_clipping_is_the_formula():
    rng = np.random.default_rng(0)
    for clip in (1e-6, 0.3, 1.0, 7.0, 1e6):
        for scale in (0.01, 0.999, 1.001, 50.0):
            update = torch.from_numpy(rng.normal(size=1000))
            update *= scale * clip / update.norm()
            units, within = mechanism.clipped(update, clip)
            wanted = update * min(1.0, clip / float(update.norm()))
            got = units * mechanism.unit(clip)
            assert within == (scale < 1)
            assert float((got - wanted).abs().max()) <= 1.1 * mechanism.unit(clip) + 1e-9 * clip
            assert float(got.norm()) <= clip and torch.equal(units, units.round())
    units, within = mechanism.clipped(torch.zeros(5), 1.0)
    assert within and not units.any()


def test_one_client_moves_the_sum_by_no_more_than_the_norm():
    """Added or taken away: whatever it sends, also the worst."""
    for clip in (0.1, 1.0):
        others = sum(mechanism.clipped(torch.randn(64), clip)[0] for _ in range(5))
        for worst in (
            torch.full((64,), 1e30), torch.full((64,), -3e38), 1e-30 * torch.ones(64),
            torch.nn.functional.one_hot(torch.tensor(3), 64) * 1e9, torch.randn(64) * 1e6,
        ):  # fmt: skip
            with_it = others + mechanism.clipped(worst, clip)[0]
            assert float((with_it - others).norm()) * mechanism.unit(clip) <= clip


def test_what_is_not_finite_stays_so():
    """So that the sums refuse it."""
    for bad in (float("inf"), float("nan")):
        units, _ = mechanism.clipped(torch.tensor([1.0, bad]), 1.0)
        assert not torch.isfinite(units).all()


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_noise_is_normal(dtype):
    """Moments, tails and the distribution, within what so many draws allow; as the mean has it."""
    from scipy import stats

    clip, deviation = 0.5, 1.7
    drawn = mechanism.noise(KEY, 0, NUMBERS, deviation, clip) * mechanism.unit(clip)
    drawn = drawn.astype(dtype).astype(np.float64) / (deviation * clip)
    assert abs(drawn.mean()) < 5 / math.sqrt(NUMBERS)
    assert abs(drawn.std() - 1) < 5 / math.sqrt(2 * NUMBERS)
    assert stats.kstest(drawn, "norm").pvalue > 1e-3
    assert abs((np.abs(drawn) > 3).mean() - 0.0026998) < 6e-4
    assert abs(np.corrcoef(drawn[::2], drawn[1::2])[0, 1]) < 0.015


def test_noise_is_whole_and_its_own_in_each_round():
    first, again = (mechanism.noise(KEY, 3, 1000, 1.0, 1.0) for _ in range(2))
    other = mechanism.noise(KEY, 4, 1000, 1.0, 1.0)
    foreign = mechanism.noise(bytes(32), 3, 1000, 1.0, 1.0)
    assert np.array_equal(first, again) and np.array_equal(first, np.rint(first))
    for others in (other, foreign):
        assert abs(np.corrcoef(first, others)[0, 1]) < 0.2
    assert np.array_equal(streams.uniforms(KEY, "x", 0, 10), streams.uniforms(KEY, "x", 0, 99)[:10])


def test_uniforms_are_the_stream():
    """A literal reading of it."""
    stream = hashlib.shake_256(KEY + b"x/7/0").digest(8 * 3)
    wanted = [
        ((int.from_bytes(stream[8 * i : 8 * i + 8], "little") >> 11) + 1) / 2**53 for i in range(3)
    ]
    assert streams.uniforms(KEY, "x", 7, 3).tolist() == wanted


def test_poisson_sampling():
    """Each by itself, with its rate; none, and all, occur."""
    clients, rate, rounds = 20, 0.1, 4000
    drawn = [streams.coins(KEY, "sample", t, clients, rate) for t in range(rounds)]
    sizes = np.bincount([len(own) for own in drawn], minlength=clients + 1)[:6] / rounds
    wanted = [math.comb(clients, m) * rate**m * (1 - rate) ** (clients - m) for m in range(6)]
    assert np.abs(sizes - wanted).max() < 0.03 and sizes[0] > 0.08
    each = np.bincount([k for own in drawn for k in own], minlength=clients) / rounds
    assert np.abs(each - rate).max() < 0.025
    assert streams.coins(KEY, "sample", 0, 5, 1.0) == [0, 1, 2, 3, 4]


def by_hand(rate, noise, rounds, delta, grid):
    """The library's own accountant, as its documentation has it, on a grid."""
    import dp_accounting as dp
    from dp_accounting import pld

    each = dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(noise))
    own = pld.PLDAccountant(dp.NeighboringRelation.ADD_OR_REMOVE_ONE, grid)
    return own.compose(each, rounds).get_epsilon(delta)


@pytest.mark.parametrize(
    ("rate", "noise", "rounds"), [(0.1, 1.0, 100), (0.5, 2.0, 7), (1.0, 1.0, 1)]
)
def test_epsilon_is_the_librarys(rate, noise, rounds):
    found = accountant.epsilon(rate, noise, rounds, 1e-5)
    grid = accountant.interval(noise)
    assert found == pytest.approx(by_hand(rate, noise, rounds, 1e-5, grid), rel=1e-6)
    finest = by_hand(rate, noise, rounds, 1e-5, 1e-4)  # the library's own choice
    assert finest * (1 - 1e-9) <= found <= finest * (1 + 1e-4)
    assert accountant.epsilon(rate, noise, 0, 1e-5) == 0


def terms(*overrides, clients=20):
    words = ["federation.clients=20", "federation.per_round=4", "federation.rounds=3", *overrides]
    return accountant.terms(resolve("lora-fedavg", words).config, clients)


def test_the_noise_is_the_least_that_is_enough():
    """From little noise and few rounds to much noise and many."""
    found = terms("privacy.epsilon=8")
    assert found.epsilon(3) <= 8 < accountant.epsilon(0.2, found.noise - 1e-3, 3, 1e-5)
    for rate, rounds, wanted in ((0.5, 4, 100.0), (0.01, 1000, 1.0), (1.0, 3, 0.9)):
        least = accountant.solve(rate, rounds, wanted, 1e-5)
        cost, less = (accountant.epsilon(rate, z, rounds, 1e-5) for z in (least, least - 1e-3))
        assert cost <= wanted < less
    assert accountant.solve(0.001, 1, 1000.0, 1e-5) == 0.1, "the least there may be"
    with pytest.raises(UserError, match="out of reach"):
        accountant.solve(1.0, 100_000, 0.001, 1e-5)


def test_the_least_number_is_found_with_few_questions():
    """Whatever the cost's shape: smooth, with steps, or flat."""
    for cost in (lambda n: 4000 / n, lambda n: (700 / n) ** 3, lambda n: 9.0 - (n > 613),
                 lambda n: 2.0**-n, lambda n: math.exp(500 / n)):  # fmt: skip
        for wanted in (8.0, 8.5, 1e-2):
            least = next((n for n in range(1, 1001) if cost(n) <= wanted), None)
            if least is not None and least > 1:
                asked = functools.lru_cache(cost)
                assert accountant._least(asked, wanted, 1, 1000) == least
                assert asked.cache_info().misses <= 32


def test_a_budget_that_is_too_small():
    with pytest.raises(UserError, match=r"one round at privacy\.noise=1 cost.*give more noise"):
        terms("privacy.noise=1", "privacy.epsilon=0.5")
    warm = ("privacy.noise=1", "privacy.epsilon=3", "curriculum.warmup=2", "layers.score=last")
    with pytest.raises(UserError, match=r"the warm-up and one round \(3\) at"):
        terms(*warm)
    assert terms("privacy.noise=1", "privacy.epsilon=9").noise == 1


def test_the_rounds_that_a_budget_allows():
    """As many as cost no more, by asking each."""
    found = terms("privacy.noise=1", "privacy.epsilon=3")
    costs = [found.epsilon(rounds) for rounds in range(1, 13)]
    assert costs == sorted(costs)
    for budget in (2.0, 3.0, 4.0, costs[4], 100.0):
        assert found.fitting(12, budget) == sum(cost <= budget for cost in costs)
    assert found.fitting(12, None) == 12 and found.fitting(12, 0.1) == 0


def test_a_run_whose_noise_was_solved_for_gets_no_more_rounds(tmp_path):
    own = resolve("lora-fedavg", ["federation.rounds=9", "privacy.epsilon=8"]).config
    with pytest.raises(UserError, match=r"used up privacy\.epsilon"):
        preflight.check_rounds(own, 8, tmp_path)
    more = resolve("lora-fedavg", ["federation.rounds=9", "privacy.noise=1"]).config
    preflight.check_rounds(more, 8, tmp_path)


def planned(rows, *overrides):
    words = [
        f"federation.clients={len(rows)}", "federation.per_round=3", "federation.rounds=5",
        "local.batch_size=4", "privacy.unit=sample", "privacy.noise=0.8", *overrides,
    ]  # fmt: skip
    return samples.Plan(resolve("lora-fedavg", words).config, rows)


def test_rows_are_accounted_by_the_client_that_loses_most():
    """Against each client by itself: its own rate, and the steps that it made."""
    rows = (4, 9, 9, 17, 30, 2)
    own = planned(rows)
    for rounds in (0, 1, 3, 5):
        times = [0] * len(rows)
        for t in range(rounds):
            for k in sampling.sample(own.config.seed, t, len(rows), 3):
                times[k] += 1
        each = [
            accountant.epsilon(min(1.0, 4 / n), 0.8, m * 2 * math.ceil(n / 4), 1e-5)
            for n, m in zip(rows, times, strict=True)
        ]
        assert own.epsilon(rounds, 0.8) == max(each)
    assert [own.steps(k) for k in range(6)] == [2, 6, 6, 10, 16, 2]
    assert planned(rows, "local.max_steps=3").steps(4) == 3
    assert own.expected(0) == 4 and own.expected(4) == 4 and own.expected(5) == 2


def test_the_budget_of_rows():
    """Solved noise is enough and hardly more; given noise stops at the budget, or is refused."""
    rows = (5, 9, 12, 17, 30, 2)
    own = planned(rows, "privacy.epsilon=6")
    fits = own.fitting(0.8)
    costs = [own.epsilon(t, 0.8) for t in range(6)]
    assert fits == sum(cost <= 6 for cost in costs[1:]) or fits == 5
    solved = samples.Plan(
        resolve("lora-fedavg", ["federation.clients=6", "federation.per_round=3",
                "federation.rounds=5", "local.batch_size=4", "privacy.unit=sample",
                "privacy.epsilon=6"]).config, rows)  # fmt: skip
    noise = solved.noise()
    assert solved.epsilon(5, noise) <= 6 < solved.epsilon(5, noise - 2e-3)
    assert solved.fitting(noise) == 5
    with pytest.raises(UserError, match=r"the first 1 rounds at privacy\.noise=0\.8 cost"):
        planned(rows, "privacy.epsilon=0.1").noise()


def test_a_clipped_noised_step_is_that_of_opacus():
    """By hand: two layers, one row far beyond the norm. `pip install --no-deps opacus` for it."""
    optimizers = pytest.importorskip("opacus.optimizers", reason="opacus is not installed")
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    parameters = list(net.parameters())
    gradients = []
    for row in torch.randn(5, 4) * torch.tensor([[0.01], [1.0], [3.0], [0.1], [100.0]]):
        net.zero_grad()
        net(row).square().sum().backward()
        gradients.append(gradient_of(parameters))
    wanted = clipped_sum(gradients, 0.7) / 4
    split = [torch.stack(own) for own in zip(
        *(g.split([p.numel() for p in parameters]) for g in gradients), strict=True
    )]  # fmt: skip
    for p, own in zip(parameters, split, strict=True):
        setattr(p, "grad_sample", own.view(5, *p.shape))  # noqa: B010
    optimizer = optimizers.DPOptimizer(
        torch.optim.SGD(parameters, lr=1.0), noise_multiplier=0.0, max_grad_norm=0.7,
        expected_batch_size=4,
    )  # fmt: skip
    before = torch.nn.utils.parameters_to_vector(parameters).detach().clone()
    optimizer.step()
    moved = before - torch.nn.utils.parameters_to_vector(parameters)
    assert torch.allclose(moved, wanted, rtol=1e-5, atol=1e-7)


def test_adaptive_clipping_costs_what_the_noise_says():
    """The update and the bit, each by what one client can change and its noise, are one Gaussian
    mechanism of noise z."""
    for noise, expected in ((1.0, 10), (0.6, 4), (1.0, 400)):
        own = mechanism.Adaptive.of(noise, expected)
        update, bit = own.raised(noise), own.deviation
        assert update**-2 + (0.5 / bit) ** 2 == pytest.approx(noise**-2)
        assert bit >= expected / 20 and abs(own.bit(True)) == mechanism.BIT / 2


def test_adaptive_clipping_finds_the_median():
    norms = np.random.default_rng(1).lognormal(0.0, 0.5, 400)
    own, clip = mechanism.Adaptive.of(1.0, 400), mechanism.START
    for t in range(60):
        total = sum(own.bit(bool(norm <= clip)) for norm in norms) + own.noise(KEY, t)
        clip = own.next(clip, total, 400)
    assert clip == pytest.approx(np.median(norms), rel=0.15)
    # A literal step: 3 of 4 within, no noise.
    step = own.next(2.0, mechanism.BIT * (3 * 0.5 - 0.5), 4)
    assert step == pytest.approx(2.0 * math.exp(-0.2 * 0.25))


def test_the_key_is_its_owners_alone(tmp_path):
    run = tmp_path / "run"
    file = secret.place(run, "0a1b")
    secret.write(file, KEY)
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    assert run not in file.parents and secret.read(file, run) == KEY
    with pytest.raises(UserError, match=r"its secret key .* cannot be read"):
        secret.read(secret.place(run, "other"), run)
    assert streams.digest(KEY) != streams.digest(bytes(32)) and KEY.hex() not in streams.digest(KEY)
