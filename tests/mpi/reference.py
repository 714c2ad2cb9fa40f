"""FedAvg on LoRA as one plain PyTorch loop: no DeepSpeed, no MPI, no accumulation, no slots.

It shares with hpcfed what the comparison holds fixed (rows, batches, initial values) and nothing
of what it checks (engine, optimizer state, micro-batches, collective).
"""

import numpy as np
import torch
from torch import nn

from hpcfed import model
from hpcfed.data import partition, sources
from hpcfed.data.batches import Tokens, form_batches
from hpcfed.data.partition import ClientRows
from hpcfed.model import Prepared
from hpcfed.objectives import heads
from hpcfed.policies.sampling import sample
from hpcfed.rng import generator
from hpcfed.settings.config import Config
from tests.mpi.slow import obvious_losses


def begin(config: Config) -> tuple[list[ClientRows], heads.Head, Tokens, Prepared]:
    """The clients' rows, the head, the training tokens, and the model."""
    task = sources.load(config)
    rows = partition.partition(task, config)
    tokenizer = model.load_tokenizer(config)
    head = heads.build(config, task, tokenizer)
    tokens = head.encode(task.train, tokenizer, config.task.max_length)
    return rows, head, tokens, model.prepare(config, task.labels, tokens.pad_id, {})


def federated_average(config: Config) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Initial and final values (layout.size,) fp32, and the size of every batch trained."""
    rows, head, tokens, prepared = begin(config)
    network, parameters = prepared.adapted.network, prepared.adapted.parameters
    network.train()  # dropout is off by configuration
    shared = prepared.initial.clone()
    sizes = []
    for number in range(config.federation.rounds):
        total, weight = torch.zeros(len(shared), dtype=torch.float64), 0
        for client in sample(config.seed, number, len(rows), config.federation.per_round):
            _write(parameters, shared)
            optimizer, steps = _optimizer(config, parameters), 0
            if config.local.lr_schedule == "cosine":
                end, whole = config.local.lr_end, config.federation.rounds
                cosine = np.cos(np.pi * number / whole)
                optimizer.param_groups[0]["lr"] = end + (config.local.lr - end) * (1 + cosine) / 2
            for epoch in range(config.local.epochs):
                rng = generator(config.seed, "batches", number, client, epoch)
                for batch in form_batches(
                    rows[client].train, tokens.lengths, config.local.batch_size, rng
                ):
                    if steps == config.local.max_steps:
                        continue
                    steps += 1
                    loss = obvious_losses(network, head, batch, tokens).mean()
                    optimizer.zero_grad()
                    loss.backward()
                    if config.local.clip:
                        nn.utils.clip_grad_norm_(parameters, config.local.clip)
                    optimizer.step()
                    sizes.append(len(batch))
            total += len(rows[client].train) * _read(parameters).double()
            weight += len(rows[client].train)
        shared = (total / weight).float()
    return prepared.initial, shared, sizes


def _optimizer(config: Config, parameters: tuple[nn.Parameter, ...]) -> torch.optim.Optimizer:
    kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[config.local.optimizer]
    return kind(parameters, lr=config.local.lr, weight_decay=config.local.weight_decay)


def _write(parameters: tuple[nn.Parameter, ...], vector: torch.Tensor) -> None:
    sizes = [p.numel() for p in parameters]
    for parameter, value in zip(parameters, vector.split(sizes), strict=True):
        parameter.data.copy_(value.view_as(parameter))


def _read(parameters: tuple[nn.Parameter, ...]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([p.detach().numpy().ravel() for p in parameters]))
