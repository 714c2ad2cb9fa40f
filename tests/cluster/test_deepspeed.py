"""Every DeepSpeed route over real ssh and Slurm: one MPI world on two hosts."""

import re
import subprocess
import time
from pathlib import Path

import pytest

from tests.cluster.methods import words
from tests.same import assert_same
from tests.support import ROOT

PATH = f"{ROOT}/.venv/bin:/usr/local/bin:/usr/bin:/bin"
SETTINGS = f"export PATH={PATH} DS_ACCELERATOR=cpu OMP_NUM_THREADS=1;"


@pytest.fixture(scope="module")
def hostfile(shared):
    """One process a host."""
    file = shared / "hostfile"
    file.write_text("n1 slots=1\nn2 slots=1\n")
    return file


def line(shared, name, start, *extra):
    """A shell command that runs deepspeed, as `start` begins it. extra: overrides."""
    own = words("fibecfed", shared, name, *extra)
    return " ".join([SETTINGS, start, "launch/train.py", "fibecfed", *own])


def test_pdsh(lab, shared, undisturbed):
    """The default launcher, two processes a host: no MPI world until the first one makes it one."""
    hostfile = shared / "two-a-host"
    hostfile.write_text("n1 slots=2\nn2 slots=2\n")
    start = f"deepspeed --num_nodes 2 --hostfile {hostfile} --master_port 29611"
    command = f"cd {ROOT}; " + line(shared, "pdsh", start)
    printed = lab.run("ssh", "n1", command)
    assert "4 ranks = 4 slots" in printed
    assert_same(shared / "pdsh", undisturbed["fibecfed"])


def test_slurm(lab, shared, hostfile, undisturbed):
    start = (
        "salloc --nodes=2 --ntasks-per-node=1 deepspeed --num_nodes 2 --launcher slurm "
        f"--launcher_args=--mpi=pmix --hostfile {hostfile}"
    )
    printed = lab.run("bash", "-c", line(shared, "slurm", start))
    assert "2 ranks = 2 slots" in printed
    assert_same(shared / "slurm", undisturbed["fibecfed"])


def test_openmpi(lab, shared, hostfile, undisturbed):
    arguments = "--allow-run-as-root --mca btl_tcp_if_include 10.77.0.0/24"
    start = f'deepspeed --hostfile {hostfile} --launcher openmpi --launcher_args "{arguments}"'
    printed = lab.run("bash", "-c", line(shared, "openmpi", start))
    assert "2 ranks = 2 slots" in printed
    assert_same(shared / "openmpi", undisturbed["fibecfed"])


def test_a_signal_reaches_the_run(lab, shared, hostfile):
    """TERM to the process that waits on the other host ends all, with the round dropped."""
    start = f"deepspeed --num_nodes 2 --hostfile {hostfile} --master_port 29612"
    command = f"cd {ROOT}; " + line(shared, "asked", start, "federation.rounds=500")
    process = subprocess.Popen(
        lab.command("ssh", "n1", command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    manifest = shared / "asked" / "checkpoint" / "manifest.json"
    until = time.monotonic() + 180
    while not manifest.exists() or '"rounds": 0' in manifest.read_text():
        assert process.poll() is None and time.monotonic() < until, process.communicate()[0]
        time.sleep(0.5)
    lab.run("pkill", "-USR1", "-f", "launch/train.py --local_rank=0", node="n2")
    printed, _ = process.communicate(timeout=120)
    assert "a signal asked to stop" in printed, printed
    assert not (shared / "asked" / "summary.json").exists()


def refusal(lab, shared, name, start, node="n1"):
    """The sentences that a launch that cannot work ends with."""
    command = f"cd {ROOT}; " + line(shared, name, start) + " cluster.meet_seconds=20"
    printed = lab.run("ssh", node, command, code=None, timeout=200)
    assert not (shared / name).exists()
    found = re.findall(r"hpcfed: (.*)", printed)
    assert found, printed
    return found


def test_hosts_that_do_not_reach_each_other(lab, shared, hostfile):
    """The first process listens at an address that n2 has no way to."""
    lab.run("ip", "address", "add", "10.99.0.1/32", "dev", "lo", node="n1")
    try:
        start = f"deepspeed --num_nodes 2 --hostfile {hostfile} --master_addr 10.99.0.1"
        found = refusal(lab, shared, "cut", start + " --master_port 29613")
        assert any("cannot reach the first one at 10.99.0.1:29613" in own for own in found), found
        assert any("Process 1 of 2 was not heard of within 20 s" in own for own in found), found
    finally:
        lab.run("ip", "address", "delete", "10.99.0.1/32", "dev", "lo", node="n1")


def test_mpi_missing_on_one_host(lab, shared, hostfile):
    """n2's MPI is hidden; the first process says where it is missing."""
    places = (ROOT / ".venv" / "lib", Path("/usr/lib/x86_64-linux-gnu"))
    hidden = {file.resolve() for place in places for file in place.glob("libmpi.so*")}
    assert hidden
    for file in hidden:
        lab.run("mount", "--bind", "/dev/null", str(file), node="n2")
    try:
        start = f"deepspeed --num_nodes 2 --hostfile {hostfile} --master_port 29614"
        found = refusal(lab, shared, "bare", start)
        assert any("No MPI on n2" in own for own in found), found
    finally:
        for file in hidden:
            lab.run("umount", str(file), node="n2")


def test_ranks_per_node_differ(lab, shared):
    """Three ranks on one host and one on the other are no two clients of two ranks each."""
    file = shared / "uneven"
    file.write_text("n1 slots=3\nn2 slots=1\n")
    start = f"deepspeed --num_nodes 2 --hostfile {file} --master_port 29615"
    command = f"cd {ROOT}; " + line(shared, "uneven-run", start) + " cluster.ranks_per_client=2"
    printed = lab.run("ssh", "n1", command, code=None, timeout=200)
    assert re.search(r"hpcfed: .*n1 has 3, n2 has 1", printed), printed
    assert not (shared / "uneven-run").exists()
