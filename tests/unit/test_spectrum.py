"""Lanczos, quadrature and both rules on matrices whose spectrum is known."""

import itertools

import numpy as np
import pytest
import torch

from hpcfed.importance.spectrum import (
    STEPS,
    Spectrum,
    eigengap,
    eigengap_fraction,
    lanczos,
    plateau,
    quadrature,
)


def planted(values, seed=0):
    """A symmetric matrix with these eigenvalues in a random basis, and a random start."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(len(values), len(values))))
    matrix = torch.from_numpy(basis @ np.diag(values) @ basis.T)
    start = torch.from_numpy(rng.integers(0, 2, len(values)) * 2.0 - 1.0)
    return (matrix + matrix.T) / 2, start


def spectrum_of(matrix, start, steps):
    return quadrature(*lanczos(lambda v: matrix @ v, start, steps), steps)


def test_enough_steps_give_the_eigenvalues_and_the_start_its_mass():
    values = np.sort(np.random.default_rng(1).normal(size=30))
    matrix, start = planted(values)
    found = spectrum_of(matrix, start, 30)
    assert np.allclose(found.nodes, values, atol=1e-9)
    _, vectors = np.linalg.eigh(matrix.numpy())
    mass = (vectors.T @ (start / start.norm()).numpy()) ** 2
    assert np.allclose(found.weights, mass, atol=1e-9)


def test_moments_are_exact_up_to_twice_the_steps():
    """m steps integrate polynomials of degree 2m - 1 exactly."""
    matrix, start = planted(np.random.default_rng(2).uniform(-1, 1, 60))
    found = spectrum_of(matrix, start, 5)
    v = start / start.norm()
    for power in range(10):
        wanted = v
        for _ in range(power):
            wanted = matrix @ wanted
        assert float(v @ wanted) == pytest.approx(
            float((found.nodes**power) @ found.weights), abs=1e-12
        )


def test_mass_of_clusters_is_exact_for_a_diagonal_matrix():
    """With a start of signs every direction of a diagonal matrix has mass 1/d; and the steps end
    where the Krylov space does."""
    diagonal = torch.tensor([0.0] * 70 + [1.0] * 20 + [5.0] * 10, dtype=torch.float64)
    start = torch.from_numpy(np.random.default_rng(0).integers(0, 2, 100) * 2.0 - 1.0)
    alpha, beta = lanczos(lambda v: diagonal * v, start, 50)
    assert len(alpha) == 3 and len(beta) == 2
    found = quadrature(alpha, beta, 50)
    assert np.allclose(found.nodes, [0, 1, 5], atol=1e-9)
    assert np.allclose(found.weights, [0.7, 0.2, 0.1], atol=1e-9)
    for t, mass in ((0.5, 0.7), (3.0, 0.9), (6.0, 1.0), (-1.0, 0.0)):
        assert found.mass_below(t) == pytest.approx(mass, abs=1e-9)
    sigma = (1e-5 * 5) ** 0.5  # the range is 5
    for sigmas, share in ((-1, 0.158655254), (0, 0.5), (1, 0.841344746)):
        wanted = 0.7 + 0.2 * share
        assert found.mass_below(1 + sigmas * sigma) == pytest.approx(wanted, abs=1e-7)


def test_converged_values_do_not_come_back_as_copies():
    """One eigenvalue far out converges at once; without orthogonalization it would return."""
    matrix, start = planted(np.concatenate([[1000.0], np.random.default_rng(3).uniform(0, 1, 99)]))
    found = spectrum_of(matrix, start, 60)
    assert int((found.nodes > 500).sum()) == 1


def two_groups(dim=400, kept=0.25, seed=0):
    rng = np.random.default_rng(seed)
    many = round(dim * (1 - kept))
    return np.concatenate([rng.uniform(-0.1, 0.1, many), rng.uniform(1.0, 1.2, dim - many)])


@pytest.mark.parametrize("kept", [0.25, 0.75])
def test_eigengap_finds_a_planted_gap_with_enough_steps(kept):
    matrix, start = planted(two_groups(kept=kept))
    alpha, beta = lanczos(lambda v: matrix @ v, start, STEPS)
    share = float((start / start.norm()) @ _above(matrix, 0.5) @ (start / start.norm()))
    assert share == pytest.approx(kept, abs=0.08)  # the start's own mass, near the planted share
    assert eigengap(alpha, beta, 0.0) == pytest.approx(share, abs=0.01)
    assert eigengap(alpha, beta, 0.1) == pytest.approx(share, abs=0.01)
    assert eigengap(alpha, beta, 0.3) is None, "4 x 0.3 is more than the gap"


def _above(matrix, t):
    values, vectors = np.linalg.eigh(matrix.numpy())
    own = torch.from_numpy(vectors[:, values > t])
    return own @ own.T


def test_eigengap_counts_negative_curvature_by_its_size():
    values = two_groups()
    values[-50:] *= -1
    matrix, start = planted(values)
    alpha, beta = lanczos(lambda v: matrix @ v, start, STEPS)
    assert eigengap(alpha, beta, 0.0) == pytest.approx(0.25, abs=0.06)


def test_eigengap_says_so_where_it_finds_none():
    """Too few steps, a spectrum without a gap, and halves that disagree."""
    matrix, start = planted(np.random.default_rng(4).uniform(0, 1, 400))
    assert eigengap(*lanczos(lambda v: matrix @ v, start, STEPS), 0.0) is None
    matrix, start = planted(two_groups())
    alpha, beta = lanczos(lambda v: matrix @ v, start, 4)
    assert eigengap(alpha, beta, 0.0) is None
    one = Spectrum(torch.tensor([2.0]), torch.tensor([1.0]))
    assert eigengap_fraction(one, 0.0) is None


def test_plateau_stops_where_the_density_is_flat():
    """70 % at zero, nothing between 0.05 and 5: the walk stops on the flat part, by hand."""
    nodes = torch.tensor([-0.5, 0.02, 5.0, 9.0]).double()
    weights = torch.tensor([0.3, 0.3, 0.3, 0.1]).double()
    found = Spectrum(nodes, weights)
    assert plateau(found) == pytest.approx(0.4, abs=1e-6)
    # Everything at one place: past it less than half is left, so the step is halved until four
    # points fit before it.
    assert plateau(Spectrum(torch.tensor([0.3]).double(), torch.ones(1).double())) == pytest.approx(
        1.0, abs=1e-6
    )
    negative = Spectrum(torch.tensor([-3.0, -2.0]).double(), torch.tensor([0.5, 0.5]).double())
    assert plateau(negative) is None


def test_plateau_against_the_walk_written_out():
    """Random spectra, with the walk as a list of ratios on a fine grid of steps."""
    rng = np.random.default_rng(5)
    for _ in range(20):
        nodes = torch.from_numpy(np.sort(rng.normal(0.2, 1, 6)))
        weights = torch.from_numpy(rng.dirichlet(np.ones(6)))
        spectrum = Spectrum(nodes, weights)

        def ratio(t, spectrum=spectrum):
            return 1 - spectrum.mass_below(t)

        wanted = None
        for halvings in range(20):
            walk = []
            for i in itertools.count():
                walk.append(ratio(0.1 / 2**halvings * i))
                if walk[-1] < walk[0] / 2:
                    break
                if len(walk) >= 4 and all(abs(walk[-j] - walk[-j - 1]) < 0.005 for j in (1, 2, 3)):
                    wanted = walk[-1]
                    break
            if wanted is not None:
                break
        assert plateau(spectrum) == pytest.approx(wanted)
