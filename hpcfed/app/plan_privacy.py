"""What privacy costs, for `hpcfed plan`."""

from collections.abc import Iterator

from hpcfed.data.partition import ClientRows
from hpcfed.privacy import accountant, mechanism, samples
from hpcfed.settings.config import Config
from hpcfed.settings.counts import BY_SAMPLE


def lines(config: Config, rows: list[ClientRows]) -> Iterator[str]:
    """What privacy costs, and what the noise is beside what it hides; who is sampled is secret."""
    if BY_SAMPLE.holds(config):
        yield from _sample_lines(config, rows)
        return
    clients = len(rows)
    terms, planned = accountant.terms(config, clients), config.federation.rounds
    rounds = terms.fitting(planned, config.privacy.epsilon)
    if early := accountant.ends_early(config, rounds):
        yield early
    expected = config.federation.per_round
    yield (
        f"privacy of each client: epsilon {terms.epsilon(rounds):.3f} at delta {terms.delta:g} "
        f"after {rounds} rounds, with noise z = {terms.noise:g}"
    )
    yield (
        f"  clients are drawn by Poisson sampling at rate {terms.rate:g}: {expected} a round on "
        f"average, hardly ever more than {_most(expected, clients)}"
    )
    norm, adaptive = config.privacy.clip, config.privacy.clip == "adaptive"
    deviation = terms.noise
    if adaptive:
        deviation = mechanism.Adaptive.of(terms.noise, expected).raised(terms.noise)
    yield (
        f"  a value of the mean update gets noise of {deviation / expected:.3g} times "
        + ("the norm, which follows the median" if adaptive else f"the norm of {norm:g}")
    )


def _sample_lines(config: Config, rows: list[ClientRows]) -> Iterator[str]:
    """Of DP-SGD: for the row that loses most, and what its client does."""
    own = samples.Plan(config, tuple(len(client.train) for client in rows))
    noise = own.noise()
    rounds = own.fitting(noise)
    if early := accountant.ends_early(config, rounds):
        yield early
    rate, steps = max(
        own.cases(rounds), key=lambda case: samples.worst([case], noise, config.privacy.delta)
    )
    yield (
        f"privacy of each row: epsilon {own.epsilon(rounds, noise):.3f} at delta "
        f"{config.privacy.delta:g} after {rounds} rounds, with noise z = {noise:g}"
    )
    yield (
        f"  at most; of a client whose rows are in a step with rate {rate:.4g}, in {steps} steps"
    )
    yield (
        f"  a step's mean gradient gets noise of {noise / config.local.batch_size:.3g} times the "
        f"norm of {config.privacy.clip:g}"
    )


def _most(expected: int, clients: int) -> int:
    """Four standard deviations above the average."""
    rate = expected / clients
    return min(clients, round(expected + 4 * (expected * (1 - rate)) ** 0.5))
