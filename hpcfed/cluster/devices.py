"""Which GPU a rank computes on, or why it has none.

torch is imported only where it is asked, so that a wrong launch is refused within a second.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hpcfed.errors import UserError
from hpcfed.settings.config import Cluster

if TYPE_CHECKING:
    import torch


def no_gpu() -> str:
    """Why torch sees no GPU, for messages; empty if it sees one."""
    import torch

    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES is {hidden!r}"
    if "SLURM_JOB_ID" in os.environ:
        return "this Slurm job was given none, or has none in this step; ask with --gpus-per-node"
    return "torch finds no device or driver; nvidia-smi says more"


def choose_device(node: Any, cluster: Cluster) -> tuple[torch.device, int]:
    """The device of this rank, and the LOCAL_RANK that makes DeepSpeed choose the same one.

    node: communicator of the ranks on this node. Raises UserError for ranks of one client that
    would share a GPU.
    """
    import torch

    if cluster.device == "cpu" or no_gpu():
        os.environ["DS_ACCELERATOR"] = "cpu"
        return torch.device("cpu"), node.rank
    # A GPU has a number for each process that sees it, and one name for all.
    own = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    views = node.allgather(own)
    chosen = choose_gpus(views)
    taken = Counter(view[index] for view, index in zip(views, chosen, strict=True))
    if cluster.ranks_per_client > 1 and max(taken.values()) > 1:
        raise UserError(
            f"{node.size} ranks on {socket.gethostname()} but {len(taken)} GPUs; ranks of one "
            "client cannot share a GPU: start one rank per GPU."
        )
    index = chosen[node.rank]
    torch.cuda.set_device(index)
    if cluster.deterministic:
        # Sums in one order: else attention's backward has other bits each time.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(True)
    return torch.device("cuda", index), index


def choose_gpus(views: Sequence[Sequence[str]]) -> list[int]:
    """For each rank of a node which of the GPUs that it sees it takes, by number: the one that the
    fewest ranks before it have taken. views: names of the GPUs that each rank sees, in its order,
    which are all of the node, or with --gpus-per-task each rank's own."""
    taken: Counter[str] = Counter()
    chosen = []
    for view in views:
        index = min(range(len(view)), key=lambda number: taken[view[number]])
        taken[view[index]] += 1
        chosen.append(index)
    return chosen
