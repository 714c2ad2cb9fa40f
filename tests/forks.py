"""Program: a fork server for ranks of MPI worlds. What every rank would import is imported once.

usage: forks.py SOCKET                  the server; it ends when its standard input does
       forks.py SOCKET ADDRESS FORM     a rank, as mpiexec starts it; ADDRESS and FORM as world.py's

A rank that is started so hands its environment, its directory and its streams to the server, which
forks the process that joins MPI in its place; each of the two ends with the other. Importing torch,
transformers and PEFT takes ten seconds of a core, a fork of a process that has them far less than
one. Nothing of MPI, and no thread, is in the server, so each rank starts as from a command line.
"""

import array
import contextlib
import json
import os
import socket
import sys

STREAMS = 3


def ask(server: str, words: list[str]) -> int:
    """Ask for the fork, and wait for its end; its exit code. What takes long is not imported."""
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(server)
        request = json.dumps([words, os.getcwd(), os.nice(0), dict(os.environ)]).encode()
        socket.send_fds(line, [len(request).to_bytes(8, "big")], range(STREAMS))
        line.sendall(request)
        return int.from_bytes(line.recv(1) or b"\1", "big")


def serve(address: str) -> list[str]:
    """Fork for whoever asks, until standard input ends. In a fork: the words it was asked with."""
    import select
    import signal

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    lines: dict[int, socket.socket] = {}
    waker, wake = os.pipe()
    for end in (waker, wake):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    before = signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        sources: list[int | socket.socket] = [0, waker, listener, *lines.values()]
        ready, _, _ = select.select(sources, [], [])
        if 0 in ready:
            return []
        for pid, line in lines.items():
            if line in ready:  # mpiexec has killed the one that asked
                os.kill(pid, signal.SIGKILL)
        if waker in ready:
            os.read(waker, 4096)
        _reap(lines)
        if listener in ready:
            line, _ = listener.accept()
            request, streams = _read(line)
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, before)
                for own in (listener, line, *lines.values()):
                    own.close()
                for end in (waker, wake):
                    os.close(end)
                return _become(request, streams)
            for stream in streams:
                os.close(stream)
            lines[pid] = line


def _reap(lines: dict[int, socket.socket]) -> None:
    """Tell those who wait for processes that have ended."""
    for pid in list(lines):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            with lines.pop(pid) as line, contextlib.suppress(OSError):  # it may wait no more
                line.sendall(bytes([abs(os.waitstatus_to_exitcode(status)) % 256]))


def _read(line: socket.socket) -> tuple[bytes, list[int]]:
    """What a process that asks has sent: a request, and its streams."""
    streams = array.array("i")
    head, ancillary, _, _ = line.recvmsg(8, socket.CMSG_LEN(STREAMS * streams.itemsize))
    for _, _, data in ancillary:
        streams.frombytes(data)
    request = b""
    while len(request) < int.from_bytes(head, "big"):
        request += line.recv(1 << 16)
    return request, list(streams)


def _become(request: bytes, streams: list[int]) -> list[str]:
    """Take the place of the process that asks; the words it was started with."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    words, where, niceness, environment = json.loads(request)
    os.chdir(where)
    os.nice(niceness - os.nice(0))
    os.environ.clear()
    os.environ.update(environment)
    return list(words)


def main() -> None:
    """The server, and, in a fork of it, a rank of a world."""
    from tests.mpi import world

    os.environ["DS_ACCELERATOR"] = "cpu"  # deepspeed looks for one when it is imported
    world.load()
    if words := serve(sys.argv[1]):
        world.serve(*words)


if __name__ == "__main__":
    if sys.argv[2:]:
        sys.exit(ask(sys.argv[1], sys.argv[2:]))
    main()
