"""Masked, weighted mean of client values over MPI.

A slot adds up n_k * x_k over its clients in float64 and one Allreduce adds up the slots. n_k is a
whole number and x_k fp32, so a product is exact in float64, and a sum of such products is exact
too unless their magnitudes differ by more than about 2^23: in practice the mean does not depend on
how clients fell to slots. A failed client's update is left out, never multiplied by zero.

The only file that calls MPI collectives on values.
"""

import functools
import itertools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from hpcfed.cluster.topology import Topology

Wire = Literal["float64", "float32"]

# Values that a slot adds up and divides at a time: few enough to stay in a core's cache from the
# MPI call to the division, enough to hide the call's latency; and counts are C ints before MPI 4.
CHUNK = 1 << 17


@dataclass(frozen=True)
class Mean:
    """Result of a round's exchange: the same on every rank."""

    values: torch.Tensor  # (size,) fp32
    stats: npt.NDArray[np.float64]  # the statistics, summed over the slots
    wire_bytes: int  # handed to MPI, added up over the slots


class MaskedSum:
    """One slot's part of a round: weighted sums of packed values, and a few statistics.

    size: packed values. With `per_value_weights` clients may have different masks: then weights
    travel beside the values, else only the total weight does. stats: float64 numbers that are
    summed over slots on the same wire (losses, counts, failures).
    """

    def __init__(
        self, size: int, stats: int = 0, per_value_weights: bool = False, wire: Wire = "float64"
    ) -> None:
        self.size = size
        self.per_value_weights = per_value_weights
        weights = size if per_value_weights else 1
        # Not np.zeros: numpy asks for huge pages for what it fills itself, and MPI moves those
        # faster between the processes of a node.
        self._buffer = np.empty(size + weights + stats, dtype=wire)
        self._buffer.fill(0)
        self.sums = self._buffer[:size]
        self.weights = self._buffer[size : size + weights]
        self.stats = self._buffer[size + weights :]

    def add(
        self, values: torch.Tensor, weight: int, mask: npt.NDArray[np.bool_] | None = None
    ) -> bool:
        """Add a client's packed values (size,) fp32 with weight n_k >= 0.

        mask (size,): the values this client has; only with per_value_weights. Returns False, and
        adds nothing, if a value it has is not finite: that update counts as failed.
        """
        if mask is not None and not self.per_value_weights:
            raise ValueError("masks that differ by client need per_value_weights")
        array = values.detach().cpu().numpy()
        masked = array if mask is None else np.where(mask, array, np.float32(0))
        if not np.isfinite(masked).all():
            return False
        scratch = np.empty(min(CHUNK, self.size))
        for start in range(0, self.size, CHUNK):
            piece = slice(start, min(start + CHUNK, self.size))
            product = scratch[: piece.stop - start]
            np.multiply(masked[piece], weight, out=product, dtype=np.float64)
            self.sums[piece] += product
        self.weights += weight if mask is None else weight * mask
        return True

    def mean(self, old: torch.Tensor, topology: Topology) -> Mean:
        """Weighted mean over all clients of all slots; what nobody has keeps its `old` value.

        old: (size,) fp32 on the CPU. Collective over all ranks; one Allreduce of the buffer between
        the slots, which the ranks of a slot share among themselves. Once only: it spoils the sums.
        """
        # The mean takes the place of sums already used: fresh memory would cost a page fault per
        # 4 KB, as much time as the division. A value's new place never lies behind its old one.
        mean = self._buffer.view(np.float32)[: self.size]
        before = old.numpy()
        if topology.slots == 1:
            _divide(self.sums, self.weights, before, mean)
            return Mean(torch.from_numpy(mean), self.stats.astype(np.float64), 0)
        # All ranks of a slot hold the same sums; each exchanges its part of them.
        ranks, rank = topology.ranks_per_client, topology.rank_in_slot
        edges = _edges(self.size, ranks)
        sent = self._exchange(slice(edges[rank], edges[rank + 1]), mean, before, topology)
        if ranks > 1:
            counts = [stop - start for start, stop in itertools.pairwise(edges)]
            self._gather_in_slot(mean, counts, topology)
            sent = topology.slot.allreduce(sent)
        return Mean(torch.from_numpy(mean), self.stats.astype(np.float64), sent)

    def _exchange(
        self,
        part: slice,
        mean: npt.NDArray[np.float32],
        before: npt.NDArray[np.float32],
        topology: Topology,
    ) -> int:
        """Add up this rank's part over the slots, piece by piece, and fill `mean` there.

        An Allreduce in its two halves. Each slot receives its chunk of a piece from all slots, adds
        them up in slot order and divides; then all gather the chunks, as fp32. That is a quarter
        less traffic than an Allreduce of float64, the division is shared, the order of additions is
        ours, and numpy adds faster than the MPI libraries measured (benchmarks/aggregation.py).
        Returns the bytes that the ranks with this number in all slots handed to MPI.
        """
        mpi, comm, slots = topology.world.mpi, topology.across, topology.slots
        sent = 0
        for small in (self.stats, *(() if self.per_value_weights else (self.weights,))):
            comm.Allreduce(mpi.IN_PLACE, small, op=mpi.SUM)
            sent += small.nbytes * slots
        step = CHUNK * slots
        scratch = _scratch(step, self._buffer.dtype.str)
        for start in range(part.start, part.stop, step):
            piece = slice(start, min(start + step, part.stop))
            edges = _edges(piece.stop - piece.start, slots)
            counts = [right - left for left, right in itertools.pairwise(edges)]
            length = counts[topology.slot_index]
            left = start + edges[topology.slot_index]
            sums = _scatter_add(comm, self.sums[piece], counts, length, scratch[0])
            sent += self.sums[piece].nbytes * slots + mean[piece].nbytes
            weights = self.weights
            if self.per_value_weights:
                weights = _scatter_add(comm, self.weights[piece], counts, length, scratch[1])
                sent += self.weights[piece].nbytes * slots
            _divide(sums, weights, before[left : left + length], mean[left : left + length])
            comm.Allgatherv(mpi.IN_PLACE, [mean[piece], counts])
        return sent

    def _gather_in_slot(
        self, mean: npt.NDArray[np.float32], counts: list[int], topology: Topology
    ) -> None:
        comm: Any = topology.slot
        mpi = topology.world.mpi
        if self.size < 2**31:
            comm.Allgatherv(mpi.IN_PLACE, [mean, counts])
            return
        start = 0
        for rank, count in enumerate(counts):  # counts beyond a C int
            for begin in range(start, start + count, CHUNK):
                comm.Bcast(mean[begin : min(begin + CHUNK, start + count)], root=rank)
            start += count


@functools.cache
def _scratch(size: int, dtype: str) -> npt.NDArray[Any]:
    """(2, size) values to receive sums and weights in; kept, so that its pages stay mapped."""
    return np.empty((2, size), dtype=dtype)


def _scatter_add(
    comm: Any, piece: npt.NDArray[Any], counts: list[int], length: int, scratch: npt.NDArray[Any]
) -> npt.NDArray[Any]:
    """This slot's chunk (length,) of `piece`, added up over all slots."""
    slots = len(counts)
    comm.Alltoallv([piece, counts], [scratch[: length * slots], [length] * slots])
    total = scratch[:length]
    for slot in range(1, slots):
        total += scratch[slot * length : (slot + 1) * length]
    return total


def _edges(size: int, parts: int) -> list[int]:
    """Where `parts` nearly equal pieces of `size` values begin, and where the last ends."""
    return [size * part // parts for part in range(parts + 1)]


def _divide(
    sums: npt.NDArray[Any],
    weights: npt.NDArray[Any],
    before: npt.NDArray[np.float32],
    mean: npt.NDArray[np.float32],
) -> None:
    """mean = sums / weights, or the value before where the weight is zero; spoils `sums`.

    weights: one for each value, or a single one for all.
    """
    if len(weights) != len(sums) or len(weights) == 1:
        if weights[0] <= 0:
            mean[:] = before
            return
        sums /= weights[0]  # in place, then cast: numpy divides into another type half as fast
        mean[:] = sums
        return
    has = weights > 0
    np.divide(sums, weights, out=sums, where=has)
    mean[:] = sums
    np.copyto(mean, before, where=~has)


def gather_clients(
    rows: dict[int, npt.NDArray[np.float32]], size: int, topology: Topology
) -> tuple[dict[int, npt.NDArray[np.float32]], int]:
    """What the clients of all slots sent, (size,) each, on the first rank of the world, in the
    order of their numbers; elsewhere nothing. And the bytes that the slots handed to MPI.

    rows: of this slot's clients, on its first rank. Collective over all ranks.
    """
    world = topology.world
    own = sorted(rows) if topology.leads_slot else []
    places = {k: rank for rank, part in enumerate(world.comm.allgather(own)) for k in part}
    found: dict[int, npt.NDArray[np.float32]] = {}
    sent = 0
    for client, rank in sorted(places.items()):
        if world.rank == 0:
            found[client] = rows[client] if rank == 0 else np.empty(size, dtype=np.float32)
        if rank == 0:
            continue
        sent += size * 4
        for start in range(0, size, CHUNK):
            piece = slice(start, min(start + CHUNK, size))
            if world.rank == 0:
                world.comm.Recv(found[client][piece], source=rank)
            elif world.rank == rank:
                world.comm.Send(rows[client][piece], dest=0)
    return found, sent


def from_first(array: npt.NDArray[Any], topology: Topology) -> int:
    """Make an array on all ranks that of the first; the bytes that this rank's slot handed to
    MPI, 0 if there is one slot."""
    for start in range(0, len(array), CHUNK):
        topology.world.comm.Bcast(array[start : start + CHUNK], root=0)
    return array.nbytes if topology.slots > 1 else 0


def sum_over_ranks(array: npt.NDArray[np.float64], topology: Topology) -> npt.NDArray[np.float64]:
    """Element-wise sum over all ranks of the world, in place; for results that each rank computed
    a disjoint part of, with zeros elsewhere, so the sum is exact."""
    flat = array.reshape(-1)
    for start in range(0, len(flat), CHUNK):
        topology.world.comm.Allreduce(
            topology.world.mpi.IN_PLACE, flat[start : start + CHUNK], op=topology.world.mpi.SUM
        )
    return array


def sum_in_slot(array: npt.NDArray[np.float64], topology: Topology) -> npt.NDArray[np.float64]:
    """Element-wise sum over the ranks of a slot, in place and in rank order."""
    if topology.ranks_per_client > 1:
        parts = np.empty((topology.ranks_per_client, *array.shape))
        topology.slot.Allgather(array, parts)
        array[...] = parts[0]
        for part in parts[1:]:
            array += part
    return array
