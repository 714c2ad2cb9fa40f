"""What a run runs on: exchange, ranks, device, threads, patience."""

from dataclasses import dataclass
from typing import Literal

from hpcfed.settings.inputs import option


@dataclass(frozen=True)
class Collective:
    wire: Literal["float64", "float32"] = option(
        "float64",
        "type on the wire; float32 halves the traffic and gives up bit-identity across slots",
    )


@dataclass(frozen=True)
class Cluster:
    ranks_per_client: int = option(
        1, "MPI ranks (GPUs) of one client's DeepSpeed world", at_least=1
    )
    device: Literal["auto", "cuda", "cpu"] = option(
        "auto",
        "what ranks compute on; auto: a GPU where one is seen, else the CPU; cuda: a run that sees "
        "no GPU is refused; the Slurm scripts ask for it",
    )
    deterministic: bool = option(
        True,
        "on GPUs: the same bits each time; false allows algorithms without that, for models that "
        "have an operation with no other",
    )
    threads: int | None = option(
        None,
        "CPU threads per rank; null = OMP_NUM_THREADS, else the node's cores / its ranks",
        at_least=1,
    )
    meet_seconds: float = option(
        120.0,
        "until the processes that DeepSpeed's launcher started on all hosts have met, or the job "
        "ends; more where python starts slowly on hundreds of hosts",
        above=0,
        at_most=86_400,
    )
    timeout_minutes: float = option(
        30.0,
        "the job ends, and can be resumed, if a rank waits for so long and no other gets on",
        above=0,
        at_most=525_600,
    )
    grace_seconds: float = option(
        30.0,
        "from USR1, USR2 or TERM to the kill: a round that fits in it is finished, else dropped",
        at_least=0,
        at_most=86_400,
    )
