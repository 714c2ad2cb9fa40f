"""DP-FedAvg as one plain loop: clip, add up, add noise, divide by what was expected.

It shares with hpcfed the draws (who is sampled, the noise) and what tests/mpi/reference.py shares.
"""

import torch
from torch import nn

from hpcfed.data.batches import form_batches
from hpcfed.privacy import streams
from hpcfed.rng import generator
from hpcfed.settings.config import Config
from tests.mpi.reference import _optimizer, _read, _write, begin
from tests.mpi.slow import obvious_losses


def private_average(config: Config) -> tuple[torch.Tensor, list[list[int]], list[float]]:
    """Final values (layout.size,), who was sampled, and the norms of the updates."""
    rows, head, tokens, prepared = begin(config)
    network, parameters = prepared.adapted.network, prepared.adapted.parameters
    network.train()  # dropout is off by configuration
    shared = prepared.initial.clone()
    clip, noise = config.privacy.clip, config.privacy.noise
    assert noise is not None and clip != "adaptive" and not config.privacy.secret
    key, expected = streams.public_key(config.seed), config.federation.per_round
    everyone, norms = [], []
    for number in range(config.federation.rounds):
        toss = streams.uniforms(key, "sample", number, len(rows))
        sampled = [k for k in range(len(rows)) if toss[k] <= expected / len(rows)]
        everyone.append(sampled)
        total = torch.zeros(len(shared), dtype=torch.float64)
        for client in sampled:
            _write(parameters, shared)
            optimizer = _optimizer(config, parameters)
            rng = generator(config.seed, "batches", number, client, 0)
            size = config.local.batch_size
            for batch in form_batches(rows[client].train, tokens.lengths, size, rng):
                optimizer.zero_grad()
                obvious_losses(network, head, batch, tokens).mean().backward()
                nn.utils.clip_grad_norm_(parameters, config.local.clip)
                optimizer.step()
            update = _read(parameters).double() - shared.double()
            norms.append(float(update.norm()))
            total += update * min(1.0, clip / norms[-1])
        drawn = streams.normals(key, "noise", number, len(shared))
        total += torch.from_numpy(drawn) * noise * clip
        shared = (shared.double() + total / expected).float()
    return shared, everyone, norms
