"""Where a run listens: on the job's own network, and nowhere else."""

import contextlib
import errno
import ipaddress
import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any


def open_store(comm: Any, hosts: Sequence[str], timeout: timedelta) -> tuple[Any, tuple[str, int]]:
    """A key-value store that the first rank of `comm` serves on a port that the system chose: the
    store (None on the others), and where it can be reached. hosts: of `comm`, each once, the first
    rank's first."""
    store, place = None, ("", 0)
    if comm.Get_rank() == 0:
        host = "127.0.0.1" if len(hosts) == 1 else way_to(hosts[1])
        store = make_store(host, 0, comm.Get_size(), True, timeout)
        place = (host, store.port)
    return store, comm.bcast(place, root=0)


def make_store(host: str, port: int, size: int, serves: bool, timeout: timedelta) -> Any:
    """torch's TCPStore; the one that serves listens at its host's address alone, if it can."""
    import torch.distributed as dist

    listener = listen_at(host, port) if serves else None
    descriptor, port = listener or (None, port)
    make: Any = dist.TCPStore  # type: ignore[attr-defined]
    return make(
        host, port, size, serves, timeout, wait_for_workers=False, master_listen_fd=descriptor
    )


def way_to(host: str) -> str:
    """This machine's address on the network that leads to another host, or its name where that
    cannot be told. Nothing is sent."""
    with contextlib.suppress(OSError):
        family, kind, _, _, place = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)
            address = str(probe.getsockname()[0])
        if not ipaddress.ip_address(address).is_loopback:
            return address
    return socket.gethostname()


def listen_at(host: str, port: int) -> tuple[int, int] | None:
    """A socket, as its file descriptor and port, that listens at this address alone: a TCPStore
    left to itself listens on every interface. port: 0 has the system choose.

    None where only all interfaces will do: a name that hosts like to give their loopback address,
    or an address that is translated on the way here. Raises OSError if the port is in use.
    """
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        if host != "localhost" and host != place[0] and ipaddress.ip_address(place[0]).is_loopback:
            return None
        listener = socket.create_server(place[:2], family=family)
    except socket.gaierror:
        return None
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            return None
        raise
    port = int(listener.getsockname()[1])
    return listener.detach(), port
