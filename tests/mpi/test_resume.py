"""A run that is killed, or asked to stop, at any instant ends with the bits of one that is not."""

import json

import pytest

from tests.mpi.variants import FIBECFED
from tests.same import assert_same, metrics
from tests.support import mpiexec

ROUNDS = 5
INTERRUPTED = 75

# Everything that passes from one round to the next: personal layers and their Fisher momentum,
# difficulties, kept moments, control variates, server momentum, the best round.
METHOD = [
    *FIBECFED, f"federation.rounds={ROUNDS}", "local.optimizer=adamw", "local.lr=1e-3",
    "local.moments=keep", "server.optimizer=momentum", "server.momentum=0.5", "server.control=true",
    "layers.score=sensitivity", "data.validation=0.2", "evaluation.every=2",
]  # fmt: skip
# What METHOD's server does not carry from round to round: the last Delta, a decaying rate and two
# sums of control variates; second moments and SCAFFOLD's control variates.
OTHERS = {
    "difference": ["server.gradient=difference", "server.lr=0.05", "server.lr_decay=0.9"],
    "yogi-scaffold": ["server.optimizer=yogi", "server.lr=0.01", "server.control=false",
                      "local.control=true"],
}  # fmt: skip
CASES = "tests.mpi.cases.resume"


def words(data, *extra):
    return [*METHOD, f"data.root={data}", f"model.name={data}/bert-classifier", *extra]


@pytest.mark.parametrize("times", [1, pytest.param(3, marks=pytest.mark.long)])
@pytest.mark.parametrize("shape", [(1, 1)])
def test_struck_at_every_kind_of_instant(worlds, data, tmp_path, shape, times):
    """Every write, rename and removal, and every event of a run, so often in different rounds."""
    (struck,) = worlds.call(
        shape, f"{CASES}:check", preset="lora-fedavg", words=words(data), folder=tmp_path,
        times=times, seconds=1200.0,
    )  # fmt: skip
    files = ("manifest.json", "metrics.jsonl", "history.jsonl", "summary.json", "run.json",
             "selection.json", "predictions.json", "round-N.safetensors",
             "adapter_model.safetensors", "personal-N.safetensors", "curriculum-N.safetensors",
             "moments-N.safetensors", "control-N.safetensors")  # fmt: skip
    for file in files:
        # While its content is written; before and after it gets its name.
        kinds = [kind for kind in struck if kind.endswith((f" {file}", f" {file}.tmp"))]
        assert len(kinds) >= (1 if file.endswith(".jsonl") else 3), (file, kinds)
    assert {"forward", "select", "exchange", "commit", "sweep"} <= struck.keys()
    assert any("unlink" in kind for kind in struck)
    assert sum(struck.values()) >= 35 * times, struck


@pytest.mark.parametrize("shape", [(1, 1)])
@pytest.mark.parametrize("name", OTHERS)
def test_other_servers_go_on(worlds, data, tmp_path, shape, name):
    worlds.call(
        shape, f"{CASES}:check", preset="lora-fedavg", words=words(data, *OTHERS[name]),
        folder=tmp_path, times=2, only=["exchange", "commit", "sweep"],
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(1, 1)])
def test_on_disk_in_time(worlds, data, tmp_path, shape):
    """A loss of power at any instant leaves the last commit, or the one before, whole."""
    (commits,) = worlds.call(
        shape, f"{CASES}:check_order", preset="lora-fedavg", words=words(data), folder=tmp_path
    )
    assert commits == ROUNDS


# From here on real processes and real signals.


def run(data, out, *extra, ranks=2, code=0):
    """A life that nothing disturbs; what it printed."""
    line = ["run", "lora-fedavg", *words(data), f"output={out}", *extra]
    return mpiexec(ranks, "hpcfed", *line, code=code)


def struck(data, out, event, count, rank, signal, *extra, ranks=2, code=None):
    """A life in which a signal strikes; it must end otherwise than well."""
    line = [event, count, rank, signal, "run", "lora-fedavg", *words(data), f"output={out}", *extra]
    if code is not None:
        return mpiexec(ranks, "interrupt.py", *map(str, line), code=code)
    with pytest.raises(AssertionError, match="exit code"):
        mpiexec(ranks, "interrupt.py", *map(str, line))
    return ""


@pytest.fixture
def undisturbed(worlds, data, common, once):
    """The run of the world (2, 1) that the chains are compared with."""
    runs = {"whole": words(data)}
    once(
        "resume-whole",
        lambda: worlds.call(
            (2, 1), "tests.mpi.cases.runs:federate", folder=common / "resume", runs=runs
        ),
    )
    return common / "resume" / "whole"


@pytest.mark.parametrize("shape", [(2, 1)])
def test_killed(undisturbed, data, tmp_path, shape):
    """SIGKILL of one rank in a round, and in a commit; the last life has another number of slots.
    The job ends with the rank, and none of its processes is left."""
    out = tmp_path / "killed"
    struck(data, out, "forward", 11, 1, "SIGKILL", "--resume")
    struck(data, out, "manifest", 2, 0, "SIGKILL", "--resume")
    assert not (out / "summary.json").exists()
    printed = run(data, out, "--resume", ranks=1)
    assert "goes on after round" in printed
    assert_same(undisturbed, out)
    lives = json.loads((out / "run.json").read_text())["lives"]
    assert lives[-1]["slots"] == 1 and lives[0]["slots"] == 2
    begun = [life["rounds_done"] for life in lives]
    assert begun == sorted(begun) and begun[0] == 0 and begun[-1] >= 1
    total = json.loads((out / "summary.json").read_text())["seconds"]
    assert total["total"] > sum(total[phase] for phase in ("train", "evaluate"))


@pytest.mark.parametrize("shape", [(2, 1)])
def test_signals(undisturbed, data, tmp_path, shape):
    """One rank is asked to stop: the round in flight is finished, or dropped if there is no time;
    the run says so, exits with 75, and ends with the same bits."""
    out = tmp_path / "signals"
    hurried = ["cluster.grace_seconds=0", "--resume"]
    first = struck(data, out, "forward", 20, 1, "SIGUSR1", *hurried, code=INTERRUPTED)
    dropped = len(metrics(out))
    assert f"{dropped} of {ROUNDS} rounds are committed" in first
    struck(data, out, "forward", 1, 0, "SIGTERM", "--resume", code=INTERRUPTED)
    assert len(metrics(out)) == dropped + 1, "there was time for the round"
    # The signal comes after the first commit of this life: one more round fits.
    struck(data, out, "sweep", 1, 1, "SIGUSR2", "--resume", code=INTERRUPTED)
    assert len(metrics(out)) == dropped + 3
    run(data, out, "--resume")
    assert_same(undisturbed, out)


@pytest.mark.parametrize("shape", [(2, 1)])
def test_a_signal_while_layers_are_chosen(undisturbed, data, tmp_path, shape):
    """One of two slots hears it, and there is no time: both leave, and it is chosen again."""
    out = tmp_path / "chosen"
    hurried = ["cluster.grace_seconds=0"]
    printed = struck(data, out, "select", 1, 1, "SIGUSR1", *hurried, code=INTERRUPTED)
    assert f"1 of {ROUNDS} rounds are committed" in printed
    assert not (out / "selection.json").exists()
    run(data, out, "--resume")
    assert_same(undisturbed, out)


@pytest.mark.parametrize("shape", [(1, 2)])
def test_two_ranks_of_a_client_drop_the_round_together(worlds, data, tmp_path, shape):
    """Only one rank of a ZeRO-2 client hears the signal."""
    form = ["cluster.ranks_per_client=2", "deepspeed=ds_configs/zero2.json"]
    hurried = [*form, "cluster.grace_seconds=0"]
    out = tmp_path / "slot"
    struck(data, out, "forward", 9, 1, "SIGUSR1", *hurried, code=INTERRUPTED)
    run(data, out, *form, "--resume")
    runs = {"whole": [*words(data), form[1]]}
    worlds.call(shape, "tests.mpi.cases.runs:federate", folder=tmp_path, runs=runs)
    assert_same(tmp_path / "whole", out)
