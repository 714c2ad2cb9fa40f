"""A run that is killed, or asked to stop, at any instant ends with the bits of one that is not."""

import json
import random
import re

import pytest

from tests.mpi.variants import FIBECFED, write_data
from tests.same import assert_same, metrics
from tests.support import mpiexec

ROUNDS = 6

# Everything that passes from one round to the next: personal layers and their Fisher momentum,
# difficulties, kept moments, control variates, server momentum, the best round.
METHOD = [
    *FIBECFED, f"federation.rounds={ROUNDS}", "local.optimizer=adamw", "local.lr=1e-3",
    "local.moments=keep", "server.optimizer=momentum", "server.momentum=0.5", "server.control=true",
    "layers.score=sensitivity", "data.validation=0.2", "evaluation.every=2",
]  # fmt: skip
INTERRUPTED = 75


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("resume")
    write_data(out)
    run(out, "whole")
    return out


def words(folder, name, *extra):
    return ["run", "lora-fedavg", *METHOD, f"data.root={folder}", f"output={folder / name}", *extra]


def run(folder, name, *extra, ranks=2, code=0):
    """A life that nothing disturbs; what it printed."""
    return mpiexec(ranks, "hpcfed", *words(folder, name, *extra), code=code)


def struck(folder, name, event, count, rank, signal, *extra, ranks=2, code=None):
    """A life in which a signal strikes; it must end otherwise than well."""
    line = [event, count, rank, signal, *words(folder, name, *extra)]
    if code is not None:
        return mpiexec(ranks, "interrupt.py", *map(str, line), code=code)
    with pytest.raises(AssertionError, match="exit code"):
        mpiexec(ranks, "interrupt.py", *map(str, line))
    return ""


def test_killed_at_seeded_instants(folder):
    """Five lives in a row end by SIGKILL of a random rank at a random instant, the commit among
    them; the sixth ends well, on another number of slots."""
    rng = random.Random(352)
    instants = [
        ("forward", rng.randint(3, 14), rng.randint(0, 1)),
        ("state", rng.randint(2, 5), rng.randint(0, 1)),
        ("exchange", 2, rng.randint(0, 1)),
        ("manifest", 2, 0),  # the round's tensors are there, its line in metrics.jsonl too
        ("sweep", 2, 0),  # between a commit and the removal of what it made superfluous
    ]
    out = folder / "killed"
    for life, (event, count, rank) in enumerate(instants):
        # Of a new run the first manifest is that of round 0, which the folder appears with.
        struck(folder, "killed", event, count, rank, "SIGKILL", "--resume")
        if life:
            assert out.is_dir()
        assert not (out / "summary.json").exists()
    printed = run(folder, "killed", "--resume", ranks=1)
    assert re.search(r"goes on after round \d", printed)
    assert_same(folder / "whole", out)
    lives = json.loads((out / "run.json").read_text())["lives"]
    assert lives[-1]["slots"] == 1 and lives[0]["slots"] == 2
    begun = [life["rounds_done"] for life in lives]
    assert begun == sorted(begun) and begun[0] == 0 and begun[-1] > 1
    total = json.loads((out / "summary.json").read_text())["seconds"]
    assert total["total"] > sum(total[phase] for phase in ("train", "evaluate"))
    assert "is complete" in run(folder, "killed", "--resume")
    assert_same(folder / "whole", out)


@pytest.mark.parametrize("event", ["adapter", "predictions", "summary"])
def test_killed_after_the_last_round(folder, event):
    struck(folder, event, event, 1, 0, "SIGKILL")
    run(folder, event, "--resume", ranks=1)
    assert_same(folder / "whole", folder / event)


def test_signals(folder):
    """One rank is asked to stop: the round in flight is finished, or dropped if there is no time;
    the run says so, exits with 75, and ends with the same bits."""
    out = folder / "signals"
    hurried = ["cluster.grace_seconds=0", "--resume"]
    first = struck(folder, "signals", "forward", 20, 1, "SIGUSR1", *hurried, code=INTERRUPTED)
    dropped = len(metrics(out))
    assert f"{dropped} of {ROUNDS} rounds are committed" in first
    struck(folder, "signals", "forward", 1, 0, "SIGTERM", "--resume", code=INTERRUPTED)
    assert len(metrics(out)) == dropped + 1, "there was time for the round"
    # The signal comes after the first commit of this life: one more round fits.
    struck(folder, "signals", "sweep", 1, 1, "SIGUSR2", "--resume", code=INTERRUPTED)
    assert len(metrics(out)) == dropped + 3
    run(folder, "signals", "--resume")
    assert_same(folder / "whole", out)


# What METHOD's server does not carry from round to round: the last Delta, a decaying rate and two
# sums of control variates; second moments and SCAFFOLD's control variates.
OTHERS = {
    "difference": ["server.gradient=difference", "server.lr=0.05", "server.lr_decay=0.9"],
    "yogi-scaffold": ["server.optimizer=yogi", "server.lr=0.01", "server.control=false",
                      "local.control=true"],
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_servers_go_on(folder, name):
    run(folder, f"{name}-whole", *OTHERS[name])
    struck(folder, name, "exchange", 5, 0, "SIGKILL", *OTHERS[name])
    assert len(metrics(folder / name)) == 4
    run(folder, name, *OTHERS[name], "--resume", ranks=1)
    assert_same(folder / f"{name}-whole", folder / name)


def test_a_signal_while_layers_are_chosen(folder):
    """One of two slots hears it, and there is no time: both leave, and it is chosen again."""
    hurried = ["cluster.grace_seconds=0"]
    printed = struck(folder, "chosen", "select", 1, 1, "SIGUSR1", *hurried, code=INTERRUPTED)
    assert f"1 of {ROUNDS} rounds are committed" in printed
    assert not (folder / "chosen" / "selection.json").exists()
    run(folder, "chosen", "--resume")
    assert_same(folder / "whole", folder / "chosen")


def test_two_ranks_of_a_client_drop_the_round_together(folder):
    """Only one rank of a ZeRO-2 client hears the signal."""
    shape = ["cluster.ranks_per_client=2", "deepspeed=ds_configs/zero2.json"]
    hurried = [*shape, "cluster.grace_seconds=0"]
    struck(folder, "slot", "forward", 9, 1, "SIGUSR1", *hurried, code=INTERRUPTED)
    run(folder, "slot", *shape, "--resume")
    run(folder, "slot-whole", *shape)
    assert_same(folder / "slot-whole", folder / "slot")


def test_refusals(folder, tmp_path):
    """What cannot be resumed is refused in one sentence, and left as it is."""

    def refused(name, *extra):
        lines = run(folder, name, *extra, ranks=1, code=2).splitlines()
        return next(line for line in lines if line.startswith("hpcfed: "))

    assert "exists already" in refused("whole") and "--resume" in refused("whole")
    changed = refused("whole", "local.epochs=7", "--resume")
    assert "local.epochs=2, not 7" in changed
    (folder / "other").mkdir()
    assert "is no run directory" in refused("other", "--resume")
