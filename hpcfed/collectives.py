"""Masked, weighted mean of client values over MPI.

A slot adds up n_k * x_k over its clients in float64 and one Allreduce adds up the slots. n_k is a
whole number and x_k fp32, so a product is exact in float64, and a sum of such products is exact
too unless their magnitudes differ by more than about 2^23: in practice the mean does not depend on
how clients fell to slots. A failed client's update is left out, never multiplied by zero.

The only file that calls MPI collectives on values.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from hpcfed.topology import Topology

Wire = Literal["float64", "float32"]

# One MPI call carries at most this many elements: counts are C ints before MPI 4, and several
# libraries compute byte counts in 32 bits. Pieces also let the division of one piece run while the
# next is on its way.
PIECE = 1 << 17


@dataclass(frozen=True)
class Mean:
    """Result of a round's exchange: the same on every rank."""

    values: torch.Tensor  # (size,) fp32
    stats: npt.NDArray[np.float64]  # the statistics, summed over the slots
    wire_bytes: int  # handed to MPI, added up over the slots


class MaskedSum:
    """One slot's share of a round: weighted sums of packed values, and a few statistics.

    size: packed values. With `per_value_weights` clients may have different masks: then weights
    travel beside the values, else only the total weight does. stats: float64 numbers that are
    summed over slots on the same wire (losses, counts, failures).
    """

    def __init__(self, size: int, stats: int = 0, per_value_weights: bool = False,
                 wire: Wire = "float64") -> None:  # fmt: skip
        self.size = size
        self.per_value_weights = per_value_weights
        weights = size if per_value_weights else 1
        self._buffer = np.zeros(size + weights + stats, dtype=wire)
        self.sums = self._buffer[:size]
        self.weights = self._buffer[size : size + weights]
        self.stats = self._buffer[size + weights :]

    def add(self, values: torch.Tensor, weight: int,
            mask: npt.NDArray[np.bool_] | None = None) -> bool:  # fmt: skip
        """Add a client's packed values (size,) fp32 with weight n_k >= 0.

        mask (size,): the values this client has; only with per_value_weights. Returns False, and
        adds nothing, if a value it has is not finite: that update counts as failed.
        """
        if mask is not None and not self.per_value_weights:
            raise ValueError("masks that differ by client need per_value_weights")
        array = values.detach().cpu().numpy()
        own = array if mask is None else np.where(mask, array, np.float32(0))
        if not np.isfinite(own).all():
            return False
        self.sums += np.multiply(own, weight, dtype=np.float64)
        self.weights += weight if mask is None else weight * mask
        return True

    def mean(self, old: torch.Tensor, topology: Topology) -> Mean:
        """Weighted mean over all clients of all slots; what nobody has keeps its `old` value.

        old: (size,) fp32 on the CPU. Collective over all ranks; one logical Allreduce, in pieces
        that the ranks of a slot share among themselves.
        """
        share, counts = self._my_share(topology)
        before = old.numpy()
        if topology.slots > 1:
            mean = self._exchange(share, before, topology)
        else:
            mean = np.empty(self.size, dtype=np.float32)
            self._divide(mean, before, 0, self.size)
        if topology.slots > 1 and topology.ranks_per_client > 1:
            self._gather_in_slot(mean, counts, topology)
        wire = self._buffer.nbytes * topology.slots if topology.slots > 1 else 0
        return Mean(torch.from_numpy(mean), self.stats.astype(np.float64), wire)

    def _my_share(self, topology: Topology) -> tuple[slice, list[int]]:
        """The values that this rank exchanges for its slot: all ranks hold the same sums."""
        ranks = topology.ranks_per_client
        edges = [self.size * r // ranks for r in range(ranks + 1)]
        rank = topology.rank_in_slot
        return slice(edges[rank], edges[rank + 1]), [b - a for a, b in zip(edges, edges[1:])]

    def _exchange(self, share: slice, before: npt.NDArray[np.float32],
                  topology: Topology) -> npt.NDArray[np.float32]:  # fmt: skip
        """Allreduce the tail (weights and statistics), then the values piece by piece."""
        mpi, comm = topology.world.mpi, topology.across
        mean = np.empty(self.size, dtype=np.float32)
        tail = self._buffer[self.size :]
        pieces = [self._buffer[i : i + PIECE] for i in range(share.start, share.stop, PIECE)]
        pieces = [p[: share.stop - share.start - i * PIECE] for i, p in enumerate(pieces)]
        for start in range(0, len(tail), PIECE):
            comm.Allreduce(mpi.IN_PLACE, tail[start : start + PIECE], op=mpi.SUM)
        for index, piece in enumerate(pieces):
            comm.Allreduce(mpi.IN_PLACE, piece, op=mpi.SUM)
            start = share.start + index * PIECE
            self._divide(mean, before, start, start + len(piece))
        return mean

    def _divide(self, mean: npt.NDArray[np.float32], before: npt.NDArray[np.float32],
                start: int, stop: int) -> None:  # fmt: skip
        """mean[start:stop] = sums / weights there, or the old value where the weight is zero."""
        span = slice(start, stop)
        if self.per_value_weights:
            has = self.weights[span] > 0
            mean[span] = before[span]
            np.divide(self.sums[span], self.weights[span], out=mean[span], where=has,
                      casting="same_kind")  # fmt: skip
        elif self.weights[0] > 0:
            np.divide(self.sums[span], self.weights[0], out=mean[span], casting="same_kind")
        else:
            mean[span] = before[span]

    def _gather_in_slot(self, mean: npt.NDArray[np.float32], counts: list[int],
                        topology: Topology) -> None:  # fmt: skip
        comm: Any = topology.slot
        mpi = topology.world.mpi
        if self.size < 2**31:
            comm.Allgatherv(mpi.IN_PLACE, [mean, counts])
            return
        start = 0
        for rank, count in enumerate(counts):  # counts beyond a C int
            for begin in range(start, start + count, PIECE):
                comm.Bcast(mean[begin : min(begin + PIECE, start + count)], root=rank)
            start += count
