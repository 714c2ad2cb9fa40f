"""Questions put to a slot's engine that change nothing in it.

They take gradients with respect to the first block's input, so that a backward pass runs through
every hook, and no parameter's gradient comes into being for DeepSpeed to reduce.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from hpcfed.cluster.collectives import sum_in_slot
from hpcfed.data.batches import Floats, Ids, Tokens
from hpcfed.engine.client import Client
from hpcfed.importance.eigenvalues import cosines, eigenvalue_score
from hpcfed.importance.fisher import Consumer, FisherSums
from hpcfed.importance.sensitivity import relative_change, worst_case_noise

# Of a central difference, relative to the norm of the values.
STEP = 3e-3


def fisher_traces(client: Client, batches: Sequence[Ids], tokens: Tokens) -> Floats:
    """(len(tokens),): D(s) of each row of `batches`, zero elsewhere; one forward and backward each.

    Dropout is off. Collective over the slot. Raises ClientError on all its ranks.
    """
    found = np.zeros(len(tokens))
    sums = FisherSums([None] * len(client.owners), client.topology.device)
    for batch in batches:
        for rows in client.shares(batch):
            sums.batch(max(len(rows), 1), 1.0)
            with client.watch.watch(outputs=False):
                _backward(client, rows, batch, tokens, sums)
            if len(rows):
                found[rows] = sums.trace.cpu().numpy()
    return sum_in_slot(found, client.topology)


def row_losses(client: Client, batches: Sequence[Ids], tokens: Tokens) -> Floats:
    """(len(tokens),): the loss of each row of `batches`, zero elsewhere; one forward each.

    Dropout is off. Collective over the slot. Raises ClientError on all its ranks.
    """
    client.probing()
    found = np.zeros(len(tokens))
    with torch.no_grad():
        for batch in batches:
            for rows in client.shares(batch):
                losses = client.forward(rows, batch, tokens, probing=True)
                if len(rows):
                    found[rows] = losses.cpu().numpy()
    return sum_in_slot(found, client.topology)


def sensitivity(client: Client, batch: Ids, tokens: Tokens) -> Floats:
    """(layers,): I_k[l], the mean over the batch's samples of the relative change of each block's
    output under the worst-case noise on the first block's input. Two forwards and a backward.

    Dropout is off. Collective over the slot. Raises ClientError on all its ranks.
    """
    total = np.zeros(len(client.watch.blocks))
    for rows in client.shares(batch):
        with client.watch.watch():
            slope = _backward(client, rows, batch, tokens, None)
            clean, entered = client.watch.left, client.watch.entered
        assert entered is not None
        filled = rows if len(rows) else batch[:1]
        mask = client.mask(filled, tokens)
        noise = worst_case_noise(entered, slope, mask)
        with torch.no_grad(), client.watch.watch(noise):
            client.forward(rows, batch, tokens, probing=True)
            noisy = client.watch.left
        if len(rows):
            total += relative_change(clean, noisy, mask).double().sum(0).cpu().numpy()
    return sum_in_slot(total, client.topology) / len(batch)


def eigenvalue_scores(client: Client, batch: Ids, tokens: Tokens) -> Floats:
    """(layers,): z[l], how alike each block makes the batch's samples. One forward; every rank of
    the slot passes the whole batch, since each sample is compared with each.

    Dropout is off. Collective over the slot. Raises ClientError on all its ranks.
    """
    client.probing()
    mask = client.mask(batch, tokens)
    with torch.no_grad(), client.watch.watch(reduce=lambda output: cosines(output, mask)):
        client.forward(batch, batch, tokens, probing=True)
        found = client.watch.left
    return np.array([eigenvalue_score(own) for own in found])


def gradient(client: Client, batch: Ids, tokens: Tokens) -> torch.Tensor:
    """(layout.size,) float64: the gradient of the batch's mean loss, from the hooks, at any stage.

    Dropout is off. Collective over the slot. Raises ClientError on all its ranks.
    """
    total = torch.zeros(client.layout.size, dtype=torch.float64)
    entries = client.layout.entries
    owned = list(client.owners.values())

    def consume(index: int, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        parts = [weight] if bias is None else [weight, bias]
        for number in owned[index]:
            own = next(part for part in parts if part.shape[1:] == entries[number].shape)
            total[entries[number].values] += own.sum(0).double().flatten().cpu()

    for rows in client.shares(batch):
        with client.watch.watch(outputs=False):
            _backward(client, rows, batch, tokens, consume)
    sum_in_slot(total.numpy(), client.topology)
    return total / len(batch)


def hessian_product(
    client: Client, at: torch.Tensor, direction: torch.Tensor, batch: Ids, tokens: Tokens
) -> torch.Tensor:
    """(layout.size,) float64: H v, H the Hessian of the batch's mean loss at `at` (layout.size,).

    Exact, by double backward, where all values are whole on each rank (stages 0 and 1, fp32, no
    checkpointing); else by central differences of two gradients.
    """
    if client.stage < 2 and not client.checkpointing and client.precise:
        return _exact_product(client, at, direction, batch, tokens)
    return _central_product(client, at, direction, batch, tokens)


def _central_product(
    client: Client, at: torch.Tensor, direction: torch.Tensor, batch: Ids, tokens: Tokens
) -> torch.Tensor:
    step = STEP * float(at.norm()) / float(direction.norm())
    found = []
    for sign in (1, -1):
        client.load((at.double() + sign * step * direction).float())
        found.append(gradient(client, batch, tokens))
    return (found[0] - found[1]) / (2 * step)


def _exact_product(
    client: Client, at: torch.Tensor, direction: torch.Tensor, batch: Ids, tokens: Tokens
) -> torch.Tensor:
    client.load(at)
    client.probing()
    total = torch.zeros(client.layout.size, dtype=torch.float64)
    # Of the attention kernels only the plain one can be differentiated twice.
    with sdpa_kernel(SDPBackend.MATH):
        for rows in client.shares(batch):
            loss = client.forward(rows, batch, tokens, probing=True).sum()
            first = torch.autograd.grad(loss, client.parameters, create_graph=True)
            device = client.topology.device
            parts = [
                (own.flatten() * direction[entry.values].to(device, own.dtype)).sum()
                for own, entry in zip(first, client.layout.entries, strict=True)
            ]
            second = torch.autograd.grad(torch.stack(parts).sum(), client.parameters)
            total += torch.cat([own.flatten().double().cpu() for own in second])
    sum_in_slot(total.numpy(), client.topology)
    return total / len(batch)


def _backward(
    client: Client, rows: Ids, batch: Ids, tokens: Tokens, consumer: Consumer | None
) -> torch.Tensor:
    """Gradient of the summed loss of `rows` at the first block's input, which is being watched;
    feeds the consumer."""
    client.probing()
    client.taps.listen(consumer)
    try:
        losses = client.forward(rows, batch, tokens, probing=True)
        entered = client.watch.entered
        assert entered is not None
        anchor = client.model.anchor
        ends = [entered] if anchor is None else [entered, anchor]
        gradient, *_ = torch.autograd.grad(losses.sum(), ends)
    finally:
        client.taps.listen(None)
    return gradient
