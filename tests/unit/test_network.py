"""Sockets of the job's own network: what a store listens at, and what is refused."""

import errno
import socket
from datetime import timedelta

import pytest
import torch.distributed as dist

from hpcfed.cluster.network import listen_at, way_to


def listening(port: int) -> set[str]:
    """Local addresses, as the kernel writes them, that listen at a port."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with open(table) as lines:
            for line in list(lines)[1:]:
                place, state = line.split()[1], line.split()[3]
                address, number = place.split(":")
                if state == "0A" and int(number, 16) == port:
                    found.add(address)
    return found


def test_a_store_listens_at_one_address():
    make_store = dist.TCPStore  # type: ignore[attr-defined]
    listener = listen_at("127.0.0.1", 0)
    assert listener is not None
    descriptor, port = listener
    place, wait = ("127.0.0.1", port, 1), timedelta(seconds=5)
    store = make_store(*place, True, wait, master_listen_fd=descriptor)
    store.set("key", "value")
    other = make_store(*place, False, wait)
    assert other.get("key") == b"value"
    assert listening(port) == {"0100007F"}


def test_a_port_in_use_is_no_way_out():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        listen_at("127.0.0.1", taken.getsockname()[1])


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_addresses_that_are_not_here(host):
    """A translated address, a name that does not resolve: the store listens everywhere, as torch
    would have it."""
    assert listen_at(host, 0) is None


def test_a_name_of_the_loopback_is_no_network(monkeypatch):
    """As Debian's 127.0.1.1 for a host's own name: others could not reach it."""
    place = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: place)
    assert listen_at("node7", 0) is None
    assert way_to("node8") == socket.gethostname()


@pytest.mark.parametrize(
    ("answer", "found"), [("10.1.2.3", "10.1.2.3"), ("127.0.0.1", ""), (None, "")]
)
def test_the_way_to_another_host(monkeypatch, answer, found):
    """The address of the interface that packets to it leave by, if there is one; else a name."""

    class Probe:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def connect(self, place):
            assert place == ("10.1.2.9", 9)
            if answer is None:
                raise OSError(errno.ENETUNREACH, "no way")

        def getsockname(self):
            return (answer, 40000)

    place = [(socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("10.1.2.9", 9))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: place)
    monkeypatch.setattr(socket, "socket", Probe)
    assert way_to("node8") == (found or socket.gethostname())
