"""What the server's step remembers from round to round, on flat tensors.

It has a place for every trainable value, so what is shared may change from round to round: vectors
(size,) are layout.size long, packed ones (n,) hold the values of the round's shared part.
"""

import torch

from hpcfed.adapters.layout import AdapterLayout, Part
from hpcfed.state import ServerState

LEAST_LR = 1e-4  # where server.lr_decay ends


class Memory:
    """The server's vectors by name, and its decaying rate; both are part of the run's state."""

    def __init__(self, layout: AdapterLayout, state: ServerState, decay: float) -> None:
        self.layout = layout
        self._state, self._decay = state, decay

    def has(self, name: str) -> bool:
        """Whether something was ever set under this name."""
        return name in self._state.vectors

    def get(self, name: str, shared: Part, start: float = 0.0) -> torch.Tensor:
        """(n,) of what is remembered; at first `start` everywhere."""
        vector = self._state.vectors.get(name)
        return torch.full((shared.size,), start) if vector is None else shared.pack(vector)

    def set(self, name: str, shared: Part, packed: torch.Tensor, start: float = 0.0) -> None:
        """Remember packed values; elsewhere stays what was there, at first `start`."""
        before = self._state.vectors.get(name)
        self._state.vectors[name] = self.spread(packed, shared, before, start)

    def spread(
        self,
        packed: torch.Tensor,
        shared: Part,
        before: torch.Tensor | None = None,
        start: float = 0.0,
    ) -> torch.Tensor:
        """(size,): packed values at their places, elsewhere those of before, or `start`."""
        vector = torch.full((self.layout.size,), start) if before is None else before.clone()
        shared.unpack(packed, vector)
        return vector

    def rate(self) -> float:
        """The server's rate of this round; decays for the next."""
        now = self._state.lr
        self._state.lr = max(now * self._decay, min(now, LEAST_LR))
        return now
