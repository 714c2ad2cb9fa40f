"""Questions put to a slot's engine that change nothing in it.

They take gradients with respect to the first block's input, so that a backward pass runs through
every hook, and no parameter's gradient comes into being for DeepSpeed to reduce.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from hpcfed.client import Client, Floats
from hpcfed.collectives import sum_in_slot
from hpcfed.data.batches import Ids, Tokens, split_batch
from hpcfed.importance.fisher import Consumer, FisherSums
from hpcfed.importance.sensitivity import relative_change, worst_case_noise


def fisher_traces(client: Client, batches: Sequence[Ids], tokens: Tokens) -> Floats:
    """(len(tokens),): D(s) of each row of `batches`, zero elsewhere; one forward and backward each.

    Dropout is off. Collective over the slot. Raises ClientError on all its ranks.
    """
    found = np.zeros(len(tokens))
    sums = FisherSums([None] * len(client.linears), client.topology.device)
    for batch in batches:
        for rows in _shares(client, batch):
            sums.batch(max(len(rows), 1), 1.0)
            with client.watch.watch(outputs=False):
                _backward(client, rows, batch, tokens, sums)
            if len(rows):
                found[rows] = sums.trace.cpu().numpy()
    return sum_in_slot(found, client.topology)


def sensitivity(client: Client, batch: Ids, tokens: Tokens) -> Floats:
    """(layers,): I_k[l], the mean over the batch's samples of the relative change of each block's
    output under the worst-case noise on the first block's input. Two forwards and a backward.

    Dropout is off. Collective over the slot. Raises ClientError on all its ranks.
    """
    total = np.zeros(len(client.watch.blocks))
    for rows in _shares(client, batch):
        with client.watch.watch():
            gradient = _backward(client, rows, batch, tokens, None)
            clean, entered = client.watch.left, client.watch.entered
        assert entered is not None
        filled = rows if len(rows) else batch[:1]
        mask = tokens.collate(filled, client.topology.device)["attention_mask"]
        noise = worst_case_noise(entered, gradient, mask)
        with torch.no_grad(), client.watch.watch(noise):
            client.forward(rows, batch, tokens, probing=True)
            noisy = client.watch.left
        if len(rows):
            total += relative_change(clean, noisy, mask).double().sum(0).cpu().numpy()
    return sum_in_slot(total, client.topology) / len(batch)


def _shares(client: Client, batch: Ids) -> Iterator[Ids]:
    """This rank's rows of the batch, micro-step by micro-step."""
    topology = client.topology
    for shares in split_batch(batch, topology.ranks_per_client, client.micro_batch):
        yield shares[topology.rank_in_slot]


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
        (gradient,) = torch.autograd.grad(losses.sum(), entered)
    finally:
        client.taps.listen(None)
    return gradient
