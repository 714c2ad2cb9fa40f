"""What the head tells of rows that are not trained on."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from hpcfed.cluster.topology import Topology
from hpcfed.data.batches import Ids, Tokens
from hpcfed.engine.failures import Failures
from hpcfed.objectives.heads import Head


@torch.no_grad()
def predict(
    network: nn.Module,
    head: Head,
    batches: Sequence[Ids],
    tokens: Tokens,
    topology: Topology,
    failures: Failures,
) -> tuple[npt.NDArray[np.float64], str]:
    """(1 + columns, len(tokens)): 1 and what the head tells of each row of `batches`, zero
    elsewhere, and where a forward failed or told what is not finite; and why, or "".

    The ranks of the slot take the batches in turns; each returns its own rows only, so that
    the sum over ranks is the whole.
    """
    ranks, rank = topology.ranks_per_client, topology.rank_in_slot
    result = np.zeros((1 + len(head.columns), len(tokens)))
    problem = ""
    for start in range(0, len(batches), ranks):
        mine = start + rank
        # Forward is collective under ZeRO-3: a rank without a batch repeats another's.
        rows = batches[mine if mine < len(batches) else start]
        topology.world.watch.moves()
        try:
            told = head.predict(network, tokens, rows, topology.device).cpu()
        except Exception as error:
            problem = problem or failures.told(error)
            continue
        if mine < len(batches):
            finite = torch.isfinite(told).all(0)
            if not bool(finite.all()):
                problem = problem or "what it predicts is not finite"
                rows, told = rows[finite.numpy()], told[:, finite]
            result[0, rows] = 1
            result[1:, rows] = told.numpy()
    return result, problem
