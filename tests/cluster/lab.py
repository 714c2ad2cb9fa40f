"""The two-host Slurm cluster of lab.sh, from Python.

python -m tests.cluster.lab COMMAND...      start it, run the command on its head, take it down
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "tests" / "cluster" / "lab.sh"
NEEDS = (
    "slurmctld", "slurmd", "slurmdbd", "sbatch", "srun", "mariadbd", "munged", "pdsh", "sshd",
    "ip", "unshare", "nsenter", "setpriv",
)  # fmt: skip
NAMESPACES = ("--net", "--uts", "--mount", "--pid")
START_SECONDS = 120
ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY")


def why_not() -> str:
    """Why the lab cannot run on this machine, or an empty text."""
    if os.geteuid() != 0:
        return "a cluster of namespaces needs root"
    where = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = [name for name in NEEDS if shutil.which(name, path=where) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (tests/cluster/install does)"
    probe = subprocess.run(
        ["unshare", *NAMESPACES, "--fork", "--mount-proc", "true"], capture_output=True, text=True
    )
    return f"no namespaces: {probe.stderr.strip()}" if probe.returncode else ""


class Lab:
    """A running cluster; a context manager."""

    def __enter__(self) -> "Lab":
        self.folder = Path(tempfile.mkdtemp(prefix="hpcfed-lab-"))
        (self.folder / "lab").mkdir()
        self._log = (self.folder / "lab.out").open("w")
        environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
        self._process = subprocess.Popen(
            # Also if this process is killed, the cluster goes with it.
            ["setpriv", "--pdeathsig", "KILL", "unshare", *NAMESPACES,
             "--fork", "--kill-child", "--mount-proc",
             str(SCRIPT), "head", str(self.folder)],
            stdout=self._log, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip
        until = time.monotonic() + START_SECONDS
        while not (self.folder / "ready").exists():
            if self._process.poll() is not None or time.monotonic() > until:
                log = (self.folder / "lab.out").read_text()
                self.__exit__()
                raise RuntimeError(f"the cluster did not start:\n{log}")
            time.sleep(0.1)
        self._head = _only_child(self._process.pid)
        self._waiting: dict[tuple[str, str], float] = {}  # requeued jobs, and since when
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # and with it the first process of the namespaces, and so all others
        self._process.wait()
        self._log.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def command(self, *words: str, node: str = "") -> list[str]:
        """The command line that runs `words` on the head, or on a node."""
        pid = self.pid(node) if node else self._head
        return [
            "nsenter", f"--target={pid}", *NAMESPACES, f"--wd={ROOT}",
            "env", f"SLURM_CONF={self.folder}/lab/slurm.conf", "TMPDIR=/var/tmp", *words,
        ]  # fmt: skip

    def run(
        self, *words: str, node: str = "", code: int | None = 0, timeout: float = 300, **env: str
    ) -> str:
        """Run `words` on the head, or on a node; what they printed."""
        done = subprocess.run(
            self.command(*words, node=node), capture_output=True, text=True, timeout=timeout,
            env={**os.environ, **env}, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        output = done.stdout + done.stderr
        assert code is None or done.returncode == code, f"{words}: {done.returncode}\n{output}"
        return output

    def submit(self, *words: str, **env: str) -> str:
        """sbatch, on nodes that have no GPUs; returns the job's number."""
        output = self.run(
            "sbatch", "--gpus-per-node=", *words, code=0, timeout=300, **{"DEVICE": "auto", **env}
        )
        found = re.search(r"Submitted batch job (\d+)", output)
        assert found, output
        return found[1]

    def state(self, job: str) -> str:
        """The job's state, as COMPLETED."""
        shown = self.run("scontrol", "show", "job", job)
        found = re.search(r"JobState=(\w+)", shown)
        assert found, shown
        return found[1]

    def ends(self, job: str, seconds: float = 240, log: Path | None = None) -> str:
        """Wait for the job's end; its last state."""
        until = time.monotonic() + seconds
        final = 0  # a requeued job looks ended for a moment
        while True:
            state = self.state(job)
            final = final + 1 if state in ENDED else 0
            if final == 4:
                return state
            self.hurry(job)
            if time.monotonic() > until:
                text = log.read_text() if log and log.exists() else ""
                shown = self.run("scontrol", "show", "job", job)
                raise AssertionError(f"after {seconds} s still {state}:\n{shown}\n{text}")
            time.sleep(0.5)

    def hurry(self, job: str) -> None:
        """Start a requeued job soon: Slurm would hold it back for two minutes. But not at once, or
        the nodes still know that the job's credential was revoked, and kill it."""
        shown = self.run("squeue", "--noheader", "--jobs", job, "--states=PD", "--format=%r %S")
        if "BeginTime" not in shown:
            return
        if time.monotonic() > self._waiting.setdefault((job, shown), time.monotonic()) + 4:
            self.run("scontrol", "update", f"JobId={job}", "StartTime=now", code=None)

    def pid(self, node: str) -> int:
        """A node's first process, as this process numbers it."""
        for parent in _children(self._head):
            for child in _children(parent):
                words = Path(f"/proc/{child}/cmdline").read_text().split("\0")
                if words[:4] == ["slurmd", "-D", "-N", node]:
                    return child
        raise AssertionError(f"{node} is not there")

    def lose(self, node: str) -> None:
        """The node is gone: its processes, its network, at once."""
        os.kill(self.pid(node), 9)

    def restore(self, node: str) -> None:
        """Start a lost node again, and wait until jobs may use it; nothing if it is there."""
        try:
            self.pid(node)
            return
        except AssertionError:
            pass
        (self.folder / f"start-{node}").touch()
        until = time.monotonic() + 60
        while "idle" not in self.run("sinfo", "--noheader", "--nodes", node, "--format", "%T"):
            assert time.monotonic() < until, self.run("scontrol", "show", "node", node)
            time.sleep(0.5)


def _children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in found.read_text().split()] if found.exists() else []


def _only_child(pid: int) -> int:
    (child,) = _children(pid)
    return child


if __name__ == "__main__":
    reason = why_not()
    if reason:
        sys.exit(reason)
    with Lab() as lab:
        sys.exit(subprocess.run(lab.command(*(sys.argv[1:] or ["bash"]))).returncode)
