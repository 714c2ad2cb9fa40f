"""Program: a fork server for MPI ranks. What every rank would import is imported once.

usage: forks.py SOCKET                   the server; it ends when its standard input does
       forks.py SOCKET PROGRAM WORDS...  a rank, as mpiexec starts it: hpcfed, or one of tests/mpi

A rank that is started so hands its environment, its directory and its streams to the server, which
forks the process that joins MPI in its place; each of the two ends with the other. Importing torch,
transformers and PEFT takes ten seconds of a core, a fork of a process that has them far less than
one. Nothing of MPI, and no thread, is in the server, so each rank starts as from a command line.
"""

import array
import contextlib
import io
import json
import os
import runpy
import signal
import socket
import sys
from pathlib import Path

STREAMS = 3
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def ask(server: str, words: list[str]) -> int:
    """Ask for the fork, and end as it does; its exit code. What takes long is not imported."""
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(server)
        request = json.dumps([words, os.getcwd(), os.nice(0), dict(os.environ)]).encode()
        socket.send_fds(line, [len(request).to_bytes(8, "big")], range(STREAMS))
        line.sendall(request)
        pid = int.from_bytes(line.recv(8), "big")
        for number in PASSED_ON:
            signal.signal(number, lambda number, _: os.kill(pid, number))
        code = int.from_bytes(line.recv(2) or b"\0\1", "big", signed=True)
    if code < 0:
        if -code in PASSED_ON:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def serve(address: str) -> list[str]:
    """Fork for whoever asks, until standard input ends. In a fork: the words it was asked with."""
    import select

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
            line.sendall(pid.to_bytes(8, "big"))
            lines[pid] = line


def _reap(lines: dict[int, socket.socket]) -> None:
    """Tell those who wait for processes that have ended."""
    for pid in list(lines):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            with lines.pop(pid) as line, contextlib.suppress(OSError):  # it may wait no more
                line.sendall(os.waitstatus_to_exitcode(status).to_bytes(2, "big", signed=True))


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
    for output in (sys.stdout, sys.stderr):
        assert isinstance(output, io.TextIOWrapper)
        output.reconfigure(line_buffering=True)
    return list(words)


def main() -> None:
    """The server, and, in a fork of it, a rank of a world."""
    from tests.mpi import world

    os.environ["DS_ACCELERATOR"] = "cpu"  # deepspeed looks for one when it is imported
    world.load()
    if words := serve(sys.argv[1]):
        sys.argv = words
        if words[0] == "hpcfed":
            runpy.run_module("hpcfed", run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(Path(world.__file__).parent / words[0]), run_name="__main__")


if __name__ == "__main__":
    if sys.argv[2:]:
        sys.exit(ask(sys.argv[1], sys.argv[2:]))
    main()
