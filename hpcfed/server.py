"""The server step: a pure function of flat tensors, the same on every rank."""

import torch


def step(shared: torch.Tensor, mean: torch.Tensor, optimizer: str) -> torch.Tensor:
    """Next round's shared values from this round's and the clients' weighted mean.

    shared, mean: (n,) fp32, packed. `mean` (FedAvg, McMahan et al. 2017): the mean itself.
    """
    if optimizer == "mean":
        return mean
    raise ValueError(f"unknown server optimizer {optimizer!r}")
