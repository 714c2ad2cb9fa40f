"""Where a run listens: on the job's own network, and nowhere else."""

import contextlib
import errno
import ipaddress
import socket


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
