"""DP-SGD in each client as one plain loop: a backward for each row, clip, add up, add noise.

It shares with hpcfed the draws (rows of a step, noise) and what tests/mpi/reference.py shares.
"""

from collections.abc import Iterable

import torch
from torch import nn

from hpcfed.policies.sampling import sample
from hpcfed.privacy import streams
from hpcfed.settings.config import Config
from tests.mpi.reference import _optimizer, _read, _write, begin
from tests.mpi.slow import obvious_losses


def clipped_sum(gradients: list[torch.Tensor], clip: float) -> torch.Tensor:
    """(n,) of gradients of rows (n,), each cut down to the norm."""
    total = torch.zeros_like(gradients[0])
    for gradient in gradients:
        total += gradient * min(1.0, clip / max(float(gradient.norm()), 1e-30))
    return total


def gradient_of(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """(n,), flat."""
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


def private_descent(config: Config) -> tuple[torch.Tensor, list[int], list[float]]:
    """Final values (layout.size,), the rows of each step, and the norms of rows' gradients."""
    rows, head, tokens, prepared = begin(config)
    network, parameters = prepared.adapted.network, prepared.adapted.parameters
    network.train()  # dropout is off by configuration
    shared = prepared.initial.clone()
    spec, local, key = config.privacy, config.local, streams.public_key(config.seed)
    assert spec.noise is not None and spec.clip != "adaptive" and not spec.secret
    sizes: list[int] = []
    norms: list[float] = []
    for number in range(config.federation.rounds):
        total, weight = torch.zeros(len(shared), dtype=torch.float64), 0
        for client in sample(config.seed, number, len(rows), config.federation.per_round):
            own = rows[client].train
            _write(parameters, shared)
            optimizer, rate = _optimizer(config, parameters), min(1.0, local.batch_size / len(own))
            for step in range(-(-len(own) // local.batch_size) * local.epochs):
                toss = streams.uniforms(key, f"rows/{client}/{number}", step, len(own))
                gradients = [torch.zeros(len(shared))]
                for row in own[toss <= rate]:
                    optimizer.zero_grad()
                    obvious_losses(network, head, own[own == row], tokens).sum().backward()
                    gradients.append(gradient_of(parameters))
                    norms.append(float(gradients[-1].norm()))
                sizes.append(len(gradients) - 1)
                drawn = streams.normals(key, f"noise/{client}/{number}", step, len(shared))
                summed = clipped_sum(gradients[1:] or gradients[:1], spec.clip)
                noised = summed + torch.from_numpy(drawn * spec.noise * spec.clip).float()
                noised /= rate * len(own)
                for p, part in zip(
                    parameters, noised.split([p.numel() for p in parameters]), strict=True
                ):
                    p.grad = part.view_as(p).clone()
                optimizer.step()
            total += len(own) * _read(parameters).double()
            weight += len(own)
        shared = (total / weight).float()
    return shared, sizes, norms
