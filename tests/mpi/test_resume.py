"""A run that is killed, or asked to stop, at any instant ends with the bits of one that is not."""

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from tests import support
from tests.mpi.variants import COMMON, FIBECFED
from tests.same import assert_same, metrics
from tests.support import PYTHONPATH, ROOT, mpiexec

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
# Methods that share otherwise, and in how many rounds each kind of instant strikes: from the second
# one on HetLoRA's clients have given up ranks.
SHARING = [
    *COMMON, "local.optimizer=sgd", "local.lr=0.5", "federation.rounds=4", "data.validation=0.2",
    "evaluation.every=2", "curriculum.warmup=0", "layers.score=last", "layers.keep=0.5",
    "updates.rank_decay=0.3", "adapter.reduction=8",
]  # fmt: skip
TIMES = {"ffa-lora": 1, "fedsa-lora": 1, "rolora": 1, "hetlora": 2, "fedalt": 1, "adapter": 1,
         "adapter-houlsby": 1}  # fmt: skip
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
    files = ("manifest.json", "previous.json", "metrics.jsonl", "history.jsonl", "summary.json",
             "run.json", "selection.json", "predictions.json", "round-N.safetensors",
             "adapter_model.safetensors", "personal-N.safetensors", "curriculum-N.safetensors",
             "moments-N.safetensors", "control-N.safetensors")  # fmt: skip
    for file in files:
        # While its content is written, and after it got its name.
        kinds = [kind for kind in struck if kind.endswith((f" {file}", f" {file}.tmp"))]
        assert len(kinds) >= (1 if file.endswith(".jsonl") else 2), (file, kinds)
    assert {"forward", "select", "exchange", "commit", "sweep"} <= struck.keys()
    assert any("unlink" in kind for kind in struck)
    assert sum(struck.values()) >= 35 * times, struck


@pytest.mark.parametrize("shape", [(1, 1)])
@pytest.mark.parametrize("name", OTHERS)
def test_other_servers_go_on(worlds, data, tmp_path, shape, name):
    worlds.call(
        shape, f"{CASES}:check", preset="lora-fedavg", words=words(data, *OTHERS[name]),
        folder=tmp_path, times=2, only=["sweep"],
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(1, 1)])
@pytest.mark.parametrize("method", TIMES)
def test_other_ways_to_share_go_on(worlds, data, tmp_path, shape, method):
    words = [*SHARING, f"data.root={data}", f"model.name={data}/bert-classifier"]
    worlds.call(
        shape, f"{CASES}:check", preset=method, words=words, folder=tmp_path,
        times=TIMES[method], only=["exchange", "sweep"],
    )  # fmt: skip
    memos = sorted((tmp_path / "whole").glob("clients/*/updates-*.safetensors"))
    latest = {file.parent.name: file for file in memos}
    ranks = [int(load_file(file)["rank"]) for file in latest.values()]
    assert len(ranks) == (4 if method == "hetlora" else 0)
    assert ranks != [8, 6, 5, 7], "nobody has given up a rank"


@pytest.mark.parametrize("shape", [(1, 1)])
def test_on_disk_in_time(worlds, data, tmp_path, shape):
    """A loss of power at any instant leaves the last commit, or the one before, whole."""
    (commits,) = worlds.call(
        shape, f"{CASES}:check_order", preset="lora-fedavg", words=words(data), folder=tmp_path
    )
    assert commits == ROUNDS


# From here on real signals.


def life(worlds, shape, data, out, *extra, strike=None, code=0):
    """A life in a persistent world, with a signal at (event, count, rank, name); what rank 0
    printed."""
    line = ["run", "lora-fedavg", *words(data), f"output={out}", *extra, "--no-live"]
    ranks = worlds.call(shape, f"{CASES}:command", words=line, strike=strike)
    assert {own for own, _ in ranks} == {code}, ranks[0][1]
    return ranks[0][1]


def struck(data, out, *strike, code=None):
    """A life in processes of its own; it must end otherwise than well."""
    line = ["run", "lora-fedavg", *words(data), f"output={out}", "--resume"]
    command = ["interrupt.py", *map(str, strike), *line]
    if code is not None:
        return mpiexec(2, *command, code=code)
    with pytest.raises(AssertionError, match="exit code"):
        mpiexec(2, *command)
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
@pytest.mark.parametrize("asked", [False, pytest.param(True, marks=pytest.mark.long)])
def test_killed(worlds, undisturbed, data, tmp_path, shape, asked):
    """TERM, if asked, then SIGKILL of one rank in a round, and in a commit, in processes of their
    own; the last life has another number of slots. The job ends with the rank, and none of its
    processes is left."""
    out = tmp_path / "killed"
    if asked:
        struck(data, out, "forward", 3, 0, "SIGTERM", code=INTERRUPTED)
    struck(data, out, "forward", 11, 1, "SIGKILL")
    struck(data, out, "manifest", 1, 0, "SIGKILL")
    assert not (out / "summary.json").exists()
    assert "goes on after round" in life(worlds, (1, 1), data, out, "--resume")
    assert_same(undisturbed, out)
    lives = json.loads((out / "run.json").read_text())["lives"]
    assert lives[-1]["slots"] == 1 and lives[0]["slots"] == 2
    begun = [own["rounds_done"] for own in lives]
    assert begun == sorted(begun) and begun[0] == 0 and begun[-1] >= 1 + asked
    total = json.loads((out / "summary.json").read_text())["seconds"]
    assert total["total"] > sum(total[phase] for phase in ("train", "evaluate"))


@pytest.mark.long
@pytest.mark.parametrize("shape", [(2, 1)])
def test_a_full_disk_ends_the_job(worlds, undisturbed, data, tmp_path, shape):
    """One rank alone cannot write: it says so in a sentence, and no other waits for it."""
    out = tmp_path / "full"
    printed = struck(data, out, "write", 20, 0, "ENOSPC", code=2)
    own = [line for line in printed.splitlines() if line.startswith("hpcfed: ")]
    assert len(own) == 1 and "The disk is full" in own[0] and "--resume" in own[0], printed
    assert "Traceback" not in printed
    life(worlds, shape, data, out, "--resume")
    assert_same(undisturbed, out)


@pytest.mark.parametrize("shape", [(2, 1)])
def test_signals(worlds, undisturbed, data, tmp_path, shape):
    """One rank is asked to stop: the round in flight is finished, or dropped if there is no time;
    the run says so, exits with 75, and ends with the same bits. A life that has not committed a
    round has failed."""
    out = tmp_path / "signals"
    end = {"code": INTERRUPTED}
    hurried = ["cluster.grace_seconds=0"]
    nowhere = life(worlds, shape, data, out, *hurried, strike=("forward", 1, 1, "SIGUSR1"), code=1)
    assert f"0 of {ROUNDS} rounds are committed" in nowhere
    strike = ("forward", 20, 1, "SIGUSR1")
    first = life(worlds, shape, data, out, *hurried, "--resume", strike=strike, **end)
    dropped = len(metrics(out))
    assert f"{dropped} of {ROUNDS} rounds are committed" in first
    strike = ("forward", 1, 0, "SIGTERM")
    life(worlds, shape, data, out, "--resume", strike=strike, **end)
    assert len(metrics(out)) == dropped + 1, "there was time for the round"
    # The signal comes after the first commit of this life: one more round fits.
    strike = ("sweep", 1, 1, "SIGUSR2")
    life(worlds, shape, data, out, "--resume", strike=strike, **end)
    assert len(metrics(out)) == dropped + 3
    life(worlds, shape, data, out, "--resume")
    assert_same(undisturbed, out)


@pytest.mark.parametrize("shape", [(2, 1)])
def test_a_signal_while_layers_are_chosen(worlds, undisturbed, data, tmp_path, shape):
    """One of two slots hears it, and there is no time: both leave, and it is chosen again."""
    out = tmp_path / "chosen"
    strike = ("select", 1, 1, "SIGUSR1")
    printed = life(
        worlds, shape, data, out, "cluster.grace_seconds=0", strike=strike, code=INTERRUPTED
    )
    assert f"1 of {ROUNDS} rounds are committed" in printed
    assert not (out / "selection.json").exists()
    life(worlds, shape, data, out, "--resume")
    assert_same(undisturbed, out)


@pytest.mark.parametrize("shape", [(1, 2)])
def test_two_ranks_of_a_client_drop_the_round_together(worlds, data, tmp_path, shape):
    """Only one rank of a ZeRO-2 client hears the signal."""
    form = ["cluster.ranks_per_client=2", "deepspeed=ds_configs/zero2.json"]
    out, strike = tmp_path / "slot", ("forward", 9, 1, "SIGUSR1")
    hurried = [*form, "cluster.grace_seconds=0"]
    life(worlds, shape, data, out, *hurried, strike=strike, code=INTERRUPTED)
    life(worlds, shape, data, out, *form, "--resume")
    runs = {"whole": [*words(data), form[1]]}
    worlds.call(shape, "tests.mpi.cases.runs:federate", folder=tmp_path, runs=runs)
    assert_same(tmp_path / "whole", out)


@pytest.mark.long
def test_killed_at_forty_instants(worlds, data, tmp_path):
    """SIGKILL at seeded instants of one run, 40 of them: the same bits as undisturbed."""
    longer = {"federation.rounds": 400, "evaluation.every": 20, "curriculum.full_at": 0.1}
    own = words(data, *(f"{key}={value}" for key, value in longer.items()))
    out = tmp_path / "killed"
    line = support.line(["run", "lora-fedavg", *own, f"output={out}"])
    program = [sys.executable, str(ROOT / "tests" / "mpi" / "killed_often.py"), "40", "11", *line]
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    rounds = json.loads(done.stdout.splitlines()[-1])
    assert len(rounds) == 40 and rounds == sorted(rounds) and len(set(rounds)) > 20, rounds
    runs = {"whole": own}
    worlds.call((1, 1), "tests.mpi.cases.runs:federate", folder=tmp_path, runs=runs)
    assert_same(tmp_path / "whole", out)
