"""Update transforms: what stands between a client and the exchange, and between the exchange and
the server's step.

A transform is a class, constructed with the configuration and the layout; a run has those that
`updates.transforms` names, in that order. Most override one or two methods.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from hpcfed.adapters.layout import AdapterLayout
from hpcfed.round import Round
from hpcfed.settings.config import Config

# What a transform remembers of a client: tensors by name.
Memo = dict[str, torch.Tensor]


@dataclass
class Update:
    """What a client is about to send; transforms change it.

    before, values (n,): of the round's shared part, as they were handed out, and now. weight: in
    the mean, a whole number above 0, below 2^29: at first its training rows. mask (n,) bool: the
    values that it has; the mean of each value is over those that have it. None: all.
    memo: what transforms remember of this client until its next round.
    """

    client: int
    before: torch.Tensor
    values: torch.Tensor
    weight: int
    mask: torch.Tensor | None = None
    memo: Memo = field(default_factory=dict)


class Transform:
    """One that changes nothing."""

    # Whether clients have different values: then weights travel beside the values.
    masks = False
    # Whether it remembers something of each client.
    remembers = False

    def __init__(self, config: Config, layout: AdapterLayout) -> None:
        pass

    def has(self, client: int, memo: Memo) -> torch.Tensor | None:
        """(layout.size,) bool: the values that a client has, for it all others are zero, neither
        trained nor sent. None: all. Only where `masks`."""
        return None

    def on_client(self, update: Update, now: Round) -> None:
        """Change what a client sends."""

    def on_mean(self, mean: torch.Tensor, before: torch.Tensor, now: Round) -> torch.Tensor:
        """(n,) what the server's step gets for the mean (n,) of the shared part; before (n,): what
        was handed out. The same on every rank."""
        return mean


def held(transforms: Sequence[Transform], client: int, memo: Memo) -> torch.Tensor | None:
    """(layout.size,) bool: the values that a client has under all of them; None: all."""
    mask: torch.Tensor | None = None
    for transform in transforms:
        own = transform.has(client, memo)
        if own is not None:
            mask = own if mask is None else mask & own
    return mask
