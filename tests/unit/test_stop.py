"""When a round is finished, and when it is dropped, after a signal."""

import os
import signal
from unittest.mock import Mock

import pytest

from hpcfed.cluster import launcher
from hpcfed.cluster.stop import AFTER_TERM, MARGIN, SIGNALS, Stop


@pytest.fixture
def clock():
    """A clock that the test sets; and the handlers of before."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    now = [1000.0]
    yield now
    for number, handler in before.items():
        signal.signal(number, handler)


def asked(clock, grace, number, tail):
    stop = Stop(grace, clock=lambda: clock[0])
    stop.listen()
    stop.tail = tail
    assert not stop.asked and not stop.must_drop
    os.kill(os.getpid(), number)
    assert stop.asked
    return stop


@pytest.mark.parametrize(
    ("grace", "number", "tail", "until"),
    [
        (100, signal.SIGUSR1, 10, 100 - MARGIN * 10),
        (100, signal.SIGUSR2, None, 50),  # nothing known: half of the time
        (100, signal.SIGTERM, 2, AFTER_TERM - MARGIN * 2),  # Slurm does not ask how long
        (10, signal.SIGTERM, 2, 10 - MARGIN * 2),
        (10, signal.SIGUSR1, 20, 0),  # validation alone takes longer
        (0, signal.SIGUSR1, None, 0),
    ],
)
def test_a_round_may_go_on_while_there_is_time(clock, grace, number, tail, until):
    stop = asked(clock, grace, number, tail)
    if until > 0:
        clock[0] = 1000 + until - 0.01
        assert not stop.must_drop
    clock[0] = 1000 + until
    assert stop.must_drop
    os.kill(os.getpid(), number)  # a second signal buys no time
    assert stop.must_drop


def test_the_slowest_commit_so_far_is_what_a_round_needs_after_its_training(clock):
    stop = Stop(100, clock=lambda: clock[0])
    assert stop.tail is None
    for took in (3, 7, 5):
        stop.trained()
        clock[0] += took
        stop.committed()
    assert stop.tail == 7


def test_ctrl_c_asks_and_then_ends(clock, capfd):
    stop = Stop(10, clock=lambda: clock[0])
    stop.listen()
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.asked and "has 10 s" in capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_what_is_ignored_stays_ignored(clock):
    """As HUP is under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = Stop(10)
    stop.listen()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop.asked and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


@pytest.mark.parametrize(
    ("sent", "forwarded"),
    [
        ([signal.SIGUSR1], [signal.SIGUSR1]),
        ([signal.SIGUSR2], [signal.SIGUSR2]),
        ([signal.SIGTERM], [signal.SIGUSR1]),
        ([signal.SIGHUP], [signal.SIGUSR1]),
        ([signal.SIGINT, signal.SIGINT], [signal.SIGUSR1, signal.SIGTERM]),
    ],
)
def test_what_mpiexec_gets(clock, capfd, sent, forwarded):
    """TERM, HUP and INT would have it kill the ranks."""
    process = Mock()
    with launcher.forwarding(process, 7.0):
        for number in sent:
            os.kill(os.getpid(), number)
    assert [call.args[0] for call in process.send_signal.call_args_list] == forwarded
    assert ("has 7 s" in capfd.readouterr().err) == (signal.SIGINT in sent)
