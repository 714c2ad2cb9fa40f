"""Cases: the masked mean against numpy. Every rank makes the same random payloads and runs its
slot's clients."""

from unittest.mock import patch

import numpy as np
import torch

from hpcfed.cluster import collectives
from hpcfed.cluster.collectives import MaskedSum, Wire, sum_over_ranks
from hpcfed.cluster.topology import Topology

CLIENTS = 7


def check_mean(
    topology: Topology, size: int, per_value: bool, wire: Wire, chunk: int = collectives.CHUNK
) -> None:
    """Random values, weights and masks, with failed clients that send NaN and inf; exchanged in
    pieces of `chunk` values."""
    with patch.object(collectives, "CHUNK", chunk):
        check_exchange(topology, size, per_value, wire)


def check_exchange(topology: Topology, size: int, per_value: bool, wire: Wire) -> None:
    """The exchange against numpy."""
    rng = np.random.default_rng([size, per_value])
    values = rng.normal(size=(CLIENTS, size)).astype(np.float32)
    weights = rng.integers(1, 500, CLIENTS)
    weights[1] = 0
    masks = rng.random((CLIENTS, size)) < 0.6
    masks[:, 0] = False  # nobody has value 0
    old = rng.normal(size=size).astype(np.float32)
    failed = [2, 5]
    values[2, size // 2], values[5, size - 1] = np.nan, -np.inf
    masks[2, size // 2] = masks[5, size - 1] = True
    if per_value:
        values[3, 0] = np.nan  # outside its mask: must not matter

    total = MaskedSum(size, stats=2, per_value_weights=per_value, wire=wire)
    for client in range(topology.slot_index, CLIENTS, topology.slots):
        mask = masks[client] if per_value else None
        took = total.add(torch.from_numpy(values[client]), int(weights[client]), mask)
        assert took == (client not in failed), f"client {client} taken: {took}"
        total.stats += [1, client]
    mean = total.mean(torch.from_numpy(old), topology)

    fine = [c for c in range(CLIENTS) if c not in failed]
    has = (masks if per_value else np.ones_like(masks))[fine] * weights[fine, None]
    kept = np.where(has > 0, values[fine], 0).astype(np.float64)
    weight = has.sum(0)
    with np.errstate(invalid="ignore"):
        wanted = np.where(weight > 0, (kept * has).sum(0) / weight, old).astype(np.float32)
    if wire == "float64":
        assert np.array_equal(mean.values.numpy(), wanted)
    else:
        assert np.allclose(mean.values.numpy(), wanted, rtol=1e-4, atol=1e-5)
    assert mean.stats.tolist() == [CLIENTS, sum(range(CLIENTS))]
    check_same_everywhere(mean.values.numpy(), topology)

    itemsize = np.dtype(wire).itemsize
    slots, ranks = topology.slots, topology.ranks_per_client
    small = 2 * ranks + (0 if per_value else ranks)
    sums = (size * (2 if per_value else 1) + small) * itemsize * slots
    counted = sums + size * 4 if slots > 1 else 0
    assert mean.wire_bytes == counted, (mean.wire_bytes, counted)


def check_nobody(topology: Topology) -> None:
    """A round in which every client failed, or weighs nothing, changes nothing."""
    old = torch.randn(50, generator=torch.Generator().manual_seed(0))
    for weight, value in ((0, 1.0), (3, float("nan"))):
        total = MaskedSum(50)
        total.add(torch.full((50,), value), weight)
        assert torch.equal(total.mean(old, topology).values, old)


def check_sum_over_ranks(topology: Topology) -> None:
    """Each rank fills its own places."""
    array = np.zeros((3, 70_000))
    array[:, topology.world.rank :: topology.world.size] = topology.world.rank + 1
    summed = sum_over_ranks(array, topology)
    wanted = np.tile(np.arange(70_000) % topology.world.size + 1, (3, 1))
    assert np.array_equal(summed, wanted)


def check_big(topology: Topology) -> None:
    """A buffer of more than 2 GiB."""
    size = 2**28 + 17
    total = MaskedSum(size)
    total.add(torch.full((size,), float(topology.slot_index)), topology.slot_index + 1)
    mean = total.mean(torch.zeros(size), topology).values
    weights = np.arange(topology.slots) + 1
    wanted = float(np.float32(np.arange(topology.slots) @ weights / weights.sum()))
    assert bool((mean == wanted).all())


def check_same_everywhere(values: np.ndarray, topology: Topology) -> None:
    """Every rank has the same bits."""
    everyone = topology.world.comm.allgather(values.tobytes())
    assert len(set(everyone)) == 1
