"""The client's optimizer."""

from collections.abc import Sequence

import torch
from torch import nn

from hpcfed.settings.config import Local


def make_optimizer(parameters: Sequence[nn.Parameter], local: Local) -> torch.optim.Optimizer:
    """The client's torch optimizer, with torch's own defaults for what is not configured."""
    lr, decay = local.lr, local.weight_decay
    if local.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=lr, weight_decay=decay, momentum=local.momentum)
    kind = torch.optim.AdamW if local.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, lr=lr, weight_decay=decay)
