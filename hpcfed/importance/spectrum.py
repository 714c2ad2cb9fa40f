"""The spectrum of a symmetric operator too large to write down, and how many directions matter.

Stochastic Lanczos quadrature (Golub and Meurant; Ghorbani et al. 2019): m steps from a random start
give m Ritz values and weights, whose weighted sum of f approximates trace f(H) / d. Gaps between
Ritz values are not gaps between eigenvalues until there are enough steps; the rules below know it.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

STEPS = 50
_SAME_FRACTION = 0.05  # fractions from half and from all steps that differ by less agree


@dataclass(frozen=True)
class Spectrum:
    """Ritz values `nodes` (m,) ascending and their mass `weights` (m,), which sum to 1."""

    nodes: torch.Tensor
    weights: torch.Tensor

    def mass_below(self, t: float) -> float:
        """Fraction of the eigenvalues below t, smoothed by a Gaussian of variance 1e-5 max(1,
        range) as the published FedPepTAO code does, but integrated exactly, without bins."""
        spread = float(self.nodes[-1] - self.nodes[0])
        sigma = math.sqrt(1e-5 * max(1.0, spread))
        return float(self.weights @ torch.special.ndtr((t - self.nodes) / sigma))


def lanczos(
    product: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor, steps: int = STEPS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Diagonal (m,) and off-diagonal (m - 1,) of the Lanczos matrix, float64; m <= steps, fewer if
    the Krylov space ends.

    product: v (d,) -> H v, both float64. Vectors are made orthogonal to all before, twice: without
    it, converged Ritz values come back as copies, and with them mass in the wrong place.
    """
    basis = torch.empty(steps, len(start), dtype=torch.float64)
    basis[0] = start.double() / start.double().norm()
    diagonal: list[float] = []
    off: list[float] = []
    for step in range(steps):
        w = product(basis[step]).double()
        size = float(w.norm())
        diagonal.append(float(w @ basis[step]))
        so_far = basis[: step + 1]
        for _ in range(2):
            w = w - so_far.T @ (so_far @ w)
        rest = float(w.norm())
        if step + 1 == steps or rest <= 1e-10 * max(size, 1e-300):
            break
        off.append(rest)
        basis[step + 1] = w / rest
    return (
        torch.tensor(diagonal, dtype=torch.float64),
        torch.tensor(off, dtype=torch.float64),
    )


def quadrature(diagonal: torch.Tensor, off: torch.Tensor, steps: int) -> Spectrum:
    """The spectrum that the first `steps` Lanczos steps show."""
    m = min(steps, len(diagonal))
    matrix = torch.diag(diagonal[:m])
    if m > 1:
        matrix = matrix + torch.diag(off[: m - 1], 1) + torch.diag(off[: m - 1], -1)
    nodes, vectors = torch.linalg.eigh(matrix)
    return Spectrum(nodes, vectors[0].square())


def eigengap_fraction(spectrum: Spectrum, lipschitz: float) -> float | None:
    """Mass above the first gap in |lambda| that exceeds 4 Lip and 5 mean Ritz spacings, or None.

    FibecFed's rule is the first gap > 4 Lip; the second condition is ours.
    """
    size, order = spectrum.nodes.abs().sort()
    weights = spectrum.weights[order]
    if len(size) < 2:
        return None
    gaps = size.diff()
    wanted = max(4 * lipschitz, 5 * float(gaps.mean()))
    above = torch.nonzero(gaps > wanted).flatten()
    return float(weights[int(above[0]) + 1 :].sum()) if len(above) else None


def eigengap(diagonal: torch.Tensor, off: torch.Tensor, lipschitz: float) -> float | None:
    """Kept fraction by the eigengap rule, if half of the steps and all of them agree on it."""
    steps = len(diagonal)
    if steps < 4:
        return None
    half, full = (
        eigengap_fraction(quadrature(diagonal, off, m), lipschitz) for m in (steps // 2, steps)
    )
    if half is None or full is None or abs(half - full) > _SAME_FRACTION:
        return None
    return full


def plateau(spectrum: Spectrum) -> float | None:
    """Kept fraction by the plateau rule of the published FedPepTAO code, or None.

    ratio(t) = 1 - mass below t. Walk t from 0 by 0.1; if ratio(t) < ratio(0) / 2 start again with
    half the step; stop when 4 values in a row differ by less than 0.005 each.
    """
    first = 1 - spectrum.mass_below(0)
    step = 0.1
    while first > 0 and step > 1e-7:
        ratios = [first]
        while ratios[-1] >= first / 2:
            last = ratios[-4:]
            if len(last) == 4 and max(abs(b - a) for a, b in itertools.pairwise(last)) < 0.005:
                return last[-1]
            ratios.append(1 - spectrum.mass_below(step * len(ratios)))
        step /= 2
    return None
