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
from hpcfed.engine.engine import Engine
from hpcfed.importance.eigenvalues import cosines, eigenvalue_score
from hpcfed.importance.fisher import Consumer, FisherSums
from hpcfed.importance.sensitivity import relative_change, worst_case_noise
from hpcfed.policies.layers import Measured

# Of a central difference, relative to the norm of the values.
STEP = 3e-3


def fisher_traces(engine: Engine, batches: Sequence[Ids], tokens: Tokens) -> Floats:
    """(len(tokens),): D(s) of each row of `batches`, zero elsewhere; one forward and backward each.

    Dropout is off. Collective over the slot. Raises ClientError on all its ranks.
    """
    traces = np.zeros(len(tokens))
    sums = FisherSums([None] * len(engine.owners), engine.topology.device)
    for batch in batches:
        for rows in engine.micro_batches(batch):
            sums.batch(max(len(rows), 1), 1.0)
            engine.probing()
            with engine.watch.watch(outputs=False):
                input_gradient(engine, rows, batch, tokens, sums)
            if len(rows):
                traces[rows] = sums.trace.cpu().numpy()
    return sum_in_slot(traces, engine.topology)


def row_losses(engine: Engine, batches: Sequence[Ids], tokens: Tokens) -> Floats:
    """(len(tokens),): the loss of each row of `batches`, zero elsewhere; one forward each.

    Dropout is off. Collective over the slot. Raises ClientError on all its ranks.
    """
    engine.probing()
    result = np.zeros(len(tokens))
    with torch.no_grad():
        for batch in batches:
            for rows in engine.micro_batches(batch):
                losses = engine.forward(rows, batch, tokens, probing=True)
                if len(rows):
                    result[rows] = losses.cpu().numpy()
    return sum_in_slot(result, engine.topology)


def sensitivity(engine: Engine, batch: Ids, tokens: Tokens) -> Floats:
    """(layers,): I_k[l], the mean over the batch's samples of the relative change of each block's
    output under the worst-case noise on the first block's input. Two forwards and a backward.

    Dropout is off. Collective over the slot. Raises ClientError on all its ranks.
    """
    total = np.zeros(len(engine.watch.blocks))
    for rows in engine.micro_batches(batch):
        engine.probing()
        with engine.watch.watch():
            slope = input_gradient(engine, rows, batch, tokens, None)
            clean, entered = engine.watch.left, engine.watch.entered
        assert entered is not None
        filled = rows if len(rows) else batch[:1]
        mask = engine.mask(filled, tokens)
        noise = worst_case_noise(entered, slope, mask)
        with torch.no_grad(), engine.watch.watch(noise):
            engine.forward(rows, batch, tokens, probing=True)
            noisy = engine.watch.left
        if len(rows):
            total += relative_change(clean, noisy, mask).double().sum(0).cpu().numpy()
    return sum_in_slot(total, engine.topology) / len(batch)


def eigenvalue_scores(engine: Engine, batch: Ids, tokens: Tokens) -> Floats:
    """(layers,): z[l], how alike each block makes the batch's samples. One forward; every rank of
    the slot passes the whole batch, since each sample is compared with each.

    Dropout is off. Collective over the slot. Raises ClientError on all its ranks.
    """
    engine.probing()
    mask = engine.mask(batch, tokens)
    with torch.no_grad(), engine.watch.watch(reduce=lambda output: cosines(output, mask)):
        engine.forward(batch, batch, tokens, probing=True)
        matrices = engine.watch.left
    return np.array([eigenvalue_score(matrix) for matrix in matrices])


def gradient(engine: Engine, batch: Ids, tokens: Tokens) -> torch.Tensor:
    """(layout.size,) float64: the gradient of the batch's mean loss, from the hooks, at any stage.

    Dropout is off. Collective over the slot. Raises ClientError on all its ranks.
    """
    total = torch.zeros(engine.layout.size, dtype=torch.float64)
    entries = engine.layout.entries
    owned = list(engine.owners.values())

    def consume(index: int, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        parts = [weight] if bias is None else [weight, bias]
        for number in owned[index]:
            values = next(part for part in parts if part.shape[1:] == entries[number].shape)
            total[entries[number].values] += values.sum(0).double().flatten().cpu()

    for rows in engine.micro_batches(batch):
        engine.probing()
        with engine.watch.watch(outputs=False):
            input_gradient(engine, rows, batch, tokens, consume)
    sum_in_slot(total.numpy(), engine.topology)
    return total / len(batch)


def hessian_product(
    engine: Engine, at: torch.Tensor, direction: torch.Tensor, batch: Ids, tokens: Tokens
) -> torch.Tensor:
    """(layout.size,) float64: H v, H the Hessian of the batch's mean loss at `at` (layout.size,).

    Exact, by double backward, where all values are whole on each rank (stages 0 and 1, fp32, no
    checkpointing); else by central differences of two gradients.
    """
    if engine.stage < 2 and not engine.checkpointing and engine.precise:
        return _exact_product(engine, at, direction, batch, tokens)
    return _central_product(engine, at, direction, batch, tokens)


def _central_product(
    engine: Engine, at: torch.Tensor, direction: torch.Tensor, batch: Ids, tokens: Tokens
) -> torch.Tensor:
    step = STEP * float(at.norm()) / float(direction.norm())
    gradients = []
    for sign in (1, -1):
        engine.load((at.double() + sign * step * direction).float())
        gradients.append(gradient(engine, batch, tokens))
    return (gradients[0] - gradients[1]) / (2 * step)


def _exact_product(
    engine: Engine, at: torch.Tensor, direction: torch.Tensor, batch: Ids, tokens: Tokens
) -> torch.Tensor:
    engine.load(at)
    engine.probing()
    total = torch.zeros(engine.layout.size, dtype=torch.float64)
    # Of the attention kernels only the plain one can be differentiated twice.
    with sdpa_kernel(SDPBackend.MATH):
        for rows in engine.micro_batches(batch):
            loss = engine.forward(rows, batch, tokens, probing=True).sum()
            first = torch.autograd.grad(loss, engine.parameters, create_graph=True)
            device = engine.topology.device
            parts = [
                (values.flatten() * direction[entry.values].to(device, values.dtype)).sum()
                for values, entry in zip(first, engine.layout.entries, strict=True)
            ]
            second = torch.autograd.grad(torch.stack(parts).sum(), engine.parameters)
            total += torch.cat([values.flatten().double().cpu() for values in second])
    sum_in_slot(total.numpy(), engine.topology)
    return total / len(batch)


def input_gradient(
    engine: Engine, rows: Ids, batch: Ids, tokens: Tokens, consumer: Consumer | None
) -> torch.Tensor:
    """Gradient of the summed loss of `rows` at the first block's input, which is being watched;
    feeds the consumer. In the mode that the engine is in."""
    engine.taps.listen(consumer)
    try:
        losses = engine.forward(rows, batch, tokens, probing=True)
        entered = engine.watch.entered
        assert entered is not None
        anchor = engine.model.anchor
        ends = [entered] if anchor is None else [entered, anchor]
        gradient, *_ = torch.autograd.grad(losses.sum(), ends)
    finally:
        engine.taps.listen(None)
    return gradient


# Samples of a client that the eigenvalue score compares, as in the published code. They are not
# those of a training batch: of a batch of one, every layer makes its samples equally alike.
COMPARED = 8

# A forward with noise on top of a forward and backward is counted as a second pass.
SENSITIVITY = Measured(sensitivity, passes=2)
EIGENVALUE = Measured(eigenvalue_scores, samples=COMPARED)
