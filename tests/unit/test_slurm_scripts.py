"""The scripts in slurm/: what they start, what they refuse, and what passes between lives."""

import re

import pytest
import yaml

from tests.support import ROOT
from tests.unit.fake_slurm import FakeSlurm

SCRIPT = "slurm/fibecfed.sh"


@pytest.fixture
def slurm(tmp_path):
    return FakeSlurm(tmp_path / "slurm")


def test_the_step(slurm):
    code, printed = slurm.run(SCRIPT, "task.name=trec", RANKS_PER_NODE="2", RANKS_PER_CLIENT="2")
    assert code == 0, printed
    step = slurm.step()
    assert step[:5] == [
        "--mpi=pmix", "--wait=60", "--ntasks=4", "--ntasks-per-node=2", "--cpus-per-task=4",
    ]  # fmt: skip
    assert step[step.index("run") :] == [
        "run", "fibecfed", "cluster.grace_seconds=100", "cluster.device=cuda",
        "cluster.ranks_per_client=2", "task.name=trec", "--no-live",
    ]  # fmt: skip


def test_what_the_user_says_is_said_once(slurm):
    own = ["cluster.device=cpu", "cluster.grace_seconds=5", "cluster.ranks_per_client=1"]
    assert slurm.run(SCRIPT, *own, RANKS_PER_CLIENT="2", DEVICE="cuda", LAUNCH="mpirun")[0] == 0
    step = slurm.step()
    assert [word for word in step if word.startswith("cluster.")] == own
    assert step[step.index("-n") + 1] == "8" and "ppr:4:node" in step


@pytest.mark.parametrize("kind", ["pmi2", "pmix"])
def test_the_kind_of_mpi(slurm, kind):
    assert slurm.run(SCRIPT, MPI_TYPE=kind)[0] == 0
    assert slurm.step()[0] == f"--mpi={kind}"


def test_in_a_container(slurm):
    slurm.add("apptainer", "")
    image = ROOT / "README.md"  # any file
    given = {"CONTAINER": str(image), "BINDS": "/data,/scratch", "PYTHON": "python3"}
    assert slurm.run(SCRIPT, **given)[0] == 0
    step = slurm.step()
    assert step[step.index("apptainer") : step.index("run")] == [
        "apptainer", "exec", "--bind", f"{ROOT},/data,/scratch", "--pwd", str(ROOT), "--nv",
        str(image), "python3", "-m", "hpcfed",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["RANKS_PER_NODE", "SLURM_NTASKS_PER_NODE"])
@pytest.mark.parametrize("value", ["a[$(touch {})]", "0", "-1", "08", "2x", "1+1"])
def test_no_text_gets_into_arithmetic(slurm, tmp_path, name, value):
    trap = tmp_path / "executed"
    code, printed = slurm.run(SCRIPT, **{name: value.format(trap)})
    assert code == 2 and "it must be a whole number" in printed
    assert not trap.exists() and not slurm.calls("srun")


def test_nor_what_slurm_says(slurm, tmp_path):
    trap = tmp_path / "executed"
    assert slurm.run(SCRIPT, SLURM_RESTART_COUNT=f"a[$(touch {trap})]")[0] == 0
    assert not trap.exists()


def test_a_comment_is_kept(slurm):
    """Yours stays in front; failures are counted behind it, three times at most."""
    slurm.comment = "grant 12, of Ann; failures=9 are mine"
    for number in range(1, 4):
        code, printed = slurm.run(SCRIPT, STEP_CODE="1")
        assert code == 1 and "requeued" in printed
        assert slurm.comment == (
            f"grant 12, of Ann; failures=9 are mine hpcfed failures={number} nodes=n[1-2]"
        )
    code, printed = slurm.run(SCRIPT, STEP_CODE="1")
    assert code == 1 and "failed 4 times; not requeued again" in printed
    assert len(slurm.calls("scontrol")) and slurm.comment.startswith("grant 12, of Ann; failures=9")


def test_lost_nodes_of_the_life_before_are_named(slurm):
    slurm.run(SCRIPT, STEP_CODE="1", SLURM_JOB_NODELIST="n7")
    slurm.add("sinfo", "echo down*")
    assert "lost: n7 is down" in slurm.run(SCRIPT)[1]
    slurm.comment = "without a trace of ours, nodes=n9"
    assert "lost" not in slurm.run(SCRIPT)[1]


def test_a_job_without_a_comment(slurm, tmp_path):
    assert slurm.run(SCRIPT)[0] == 0
    assert slurm.comment == "hpcfed failures=0 nodes=n[1-2]"
    trap = tmp_path / "executed"
    slurm.comment = f"hpcfed failures=a[$(touch${{IFS}}{trap})] nodes=n1"
    slurm.run(SCRIPT, STEP_CODE="1")
    assert not trap.exists() and slurm.comment == "hpcfed failures=1 nodes=n[1-2]"


@pytest.mark.parametrize(("step", "code", "words"), [(2, 2, ""), (75, 1, "requeued"), (0, 0, "")])
def test_ends_that_are_no_failures(slurm, step, code, words):
    found, printed = slurm.run(SCRIPT, STEP_CODE=str(step))
    assert found == code and words in printed
    assert "failures=0" in slurm.comment


def test_a_line_of_a_sweep(slurm, tmp_path):
    """Values with blanks, quotes and newlines arrive as they are, and each option once."""
    text = "It was\n  'so' <mask> | \"x\" $(date) \t."
    file = tmp_path / "sweep.yaml"
    file.write_text(
        yaml.safe_dump(
            {"source": "fibecfed", "folder": "runs/x",
             "overrides": {"model.head": "cloze", "task.template": text},
             "grid": {"federation.rounds": [4, 5]}}
        )
    )  # fmt: skip
    got = tmp_path / "got"
    write = f'printf "%s\\0" "$@" >{got}'
    slurm.add("srun", f"[[ $1 != --mpi=list ]] || {{ echo pmix; exit; }}; {write}")
    code, printed = slurm.run(
        "slurm/sweep.sh", str(file), "federation.rounds=3", SLURM_ARRAY_TASK_ID="1"
    )
    assert code == 0, printed
    words = got.read_text().split("\0")
    given = dict(word.split("=", 1) for word in words if re.match(r"[a-z_.]+=", word))
    assert yaml.safe_load(given["task.template"]) == text
    assert words.count("federation.rounds=3") == 1 and "federation.rounds=5" not in words
    assert given["output"] == "runs/x/rounds=5"


@pytest.mark.parametrize("script", sorted((ROOT / "slurm").glob("*.sh")))
def test_directives(script):
    """GPUs are asked for by lines that count, in all scripts alike."""
    lines = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    if script.name == "job.sh":
        assert not lines
        return
    assert "#SBATCH --gpus-per-node=4" in lines and "#SBATCH --exclusive" in lines
    fixed = [line for line in lines if not re.search(r"--(job-name|output)", line)]
    assert len(fixed) == 7 and script.read_text().count("DEVICE=${DEVICE:-cuda}") == 1
