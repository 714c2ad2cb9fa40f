"""Processes of DeepSpeed's launcher that do not find each other: each says what it has seen."""

import socket

import pytest

from hpcfed.app.cli import main
from hpcfed.cluster import rejoin

WORDS = ("run", "demo", "cluster.meet_seconds=1.5")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def process(monkeypatch):
    """Make this process one of two that DeepSpeed's launcher started."""

    def become(rank: int, port: int) -> None:
        for variable in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK"):
            monkeypatch.delenv(variable, raising=False)
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
        for variable, value in {**own, "MASTER_ADDR": "127.0.0.1"}.items():
            monkeypatch.setenv(variable, str(value))

    return become


def test_one_that_cannot_reach_the_first_speaks(process, capsys):
    port = free_port()
    process(1, port)
    assert main(WORDS) == 2
    said = capsys.readouterr().err
    assert f"Process 1 on {socket.gethostname()} cannot reach the first one at 127.0.0.1:" in said
    assert said.count("hpcfed: ") == 1 and "--master_addr" in said


def test_the_first_names_the_one_it_misses(process, capsys, monkeypatch):
    process(0, free_port())
    monkeypatch.setattr(rejoin, "FAREWELL_SECONDS", 0.1)  # nobody is there
    assert main(WORDS) == 2
    said = capsys.readouterr().err
    assert "Process 1 of 2 was not heard of within 2 s (cluster.meet_seconds)" in said


def test_the_first_names_a_port_in_use(process, capsys):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        process(0, taken.getsockname()[1])
        assert main(WORDS) == 2
    assert "give deepspeed another --master_port" in capsys.readouterr().err


def test_a_fault_that_all_see_is_said_once(process, capsys):
    for rank in range(2):
        process(rank, free_port())
        assert main(["run", "demo", "local.lr=-1"]) == 2
    assert capsys.readouterr().err.count("local.lr") == 1
