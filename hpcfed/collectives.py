"""Masked, weighted mean of client values over MPI.

A slot adds up n_k * x_k over its clients in float64 and one Allreduce adds up the slots. n_k is a
whole number and x_k fp32, so a product is exact in float64, and a sum of such products is exact
too unless their magnitudes differ by more than about 2^23: in practice the mean does not depend on
how clients fell to slots. A failed client's update is left out, never multiplied by zero.

The only file that calls MPI collectives on values.
"""

import itertools
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
        mean = np.empty(self.size, dtype=np.float32)
        before = old.numpy()
        if topology.slots == 1:
            self._divide(mean, before, slice(0, self.size))
            return Mean(torch.from_numpy(mean), self.stats.astype(np.float64), 0)
        # All ranks of a slot hold the same sums; each exchanges its share of them.
        ranks, rank = topology.ranks_per_client, topology.rank_in_slot
        edges = [self.size * r // ranks for r in range(ranks + 1)]
        sent = self._exchange(slice(edges[rank], edges[rank + 1]), mean, before, topology)
        if ranks > 1:
            counts = [stop - start for start, stop in itertools.pairwise(edges)]
            self._gather_in_slot(mean, counts, topology)
            sent = topology.slot.allreduce(sent)
        wire = sent * topology.slots
        return Mean(torch.from_numpy(mean), self.stats.astype(np.float64), wire)

    def _exchange(self, share: slice, mean: npt.NDArray[np.float32],
                  before: npt.NDArray[np.float32], topology: Topology) -> int:  # fmt: skip
        """Add up this rank's share over the slots, piece by piece, and fill `mean` there.

        Returns the bytes that this rank handed to MPI.
        """
        mpi, comm = topology.world.mpi, topology.across

        def add_up(piece: npt.NDArray[np.floating[Any]]) -> int:
            comm.Allreduce(mpi.IN_PLACE, piece, op=mpi.SUM)
            return piece.nbytes

        sent = add_up(self.stats) if len(self.stats) else 0
        if not self.per_value_weights:
            sent += add_up(self.weights)
        for start in range(share.start, share.stop, PIECE):
            piece = slice(start, min(start + PIECE, share.stop))
            if self.per_value_weights:
                sent += add_up(self.weights[piece])
            sent += add_up(self.sums[piece])
            self._divide(mean, before, piece)
        return sent

    def _divide(self, mean: npt.NDArray[np.float32], before: npt.NDArray[np.float32],
                span: slice) -> None:  # fmt: skip
        """mean[span] = sums / weights there, or the old value where the weight is zero."""
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


def sum_over_ranks(array: npt.NDArray[np.float64], topology: Topology) -> npt.NDArray[np.float64]:
    """Element-wise sum over all ranks of the world, in place; for results that each rank computed
    a disjoint part of, with zeros elsewhere, so the sum is exact."""
    flat = array.reshape(-1)
    for start in range(0, len(flat), PIECE):
        topology.world.comm.Allreduce(
            topology.world.mpi.IN_PLACE, flat[start : start + PIECE], op=topology.world.mpi.SUM
        )
    return array
