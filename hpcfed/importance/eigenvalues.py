"""How alike a layer makes different samples: FedPepTAO's layer score, from its published code.

For a batch, C is the matrix of cosines between the samples' flattened outputs of a layer, and the
score the sum over its eigenvalues of ln(lambda) + 1 / lambda, with lambda = max(eigenvalue, 0) +
1e-5: large where samples are alike, since there most eigenvalues are near zero.
"""

import torch

FLOOR = 1e-5  # keeps the score finite where samples are the same


def cosines(output: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(samples, samples) float64: cosines of a layer's outputs (samples, positions, hidden), each
    flattened; mask (samples, positions), positions of padding count for nothing."""
    flat = (output * mask.unsqueeze(-1).to(output.dtype)).flatten(1).double()
    flat = flat / flat.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return flat @ flat.T


def eigenvalue_score(cosines: torch.Tensor) -> float:
    """sum ln(lambda) + 1 / lambda of a (samples, samples) matrix of cosines."""
    eigenvalues = torch.linalg.eigvalsh(cosines).clamp_min(0) + FLOOR
    return float((eigenvalues.log() + 1 / eigenvalues).sum())
