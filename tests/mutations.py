"""Breaks the code by hand, one guarantee at a time, and sees whether tests turn red.

    python -m tests.mutations             all of them, a line each; exit code 1 if one stays green
    python -m tests.mutations WORD ...    those whose description has one of these words

Each is made in a copy of the tree, and only the tests named beside it are run there, without the
long ones: what is red here is red in `make test`.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Break(NamedTuple):
    """guarantee: what no longer holds. file: below hpcfed/. old, new: of its text, once there.
    tests: what must turn red."""

    guarantee: str
    file: str
    old: str
    new: str
    tests: str


BREAKS = [
    Break(
        "a client begins with a fresh optimizer",
        "engine/masters.py",
        "        self._base.state.clear()\n",
        "",
        "mpi/test_engine.py",
    ),
    Break(
        "what is written reaches the master copy",
        "engine/values.py",
        "                safe_set_full_fp32_param(parameter, value)\n",
        "                pass\n",
        "mpi/test_engine.py",
    ),
    Break(
        "what is written reaches the frozen residual",
        "engine/engine.py",
        "        self._values.place(vector)\n",
        "",
        "mpi/test_factors.py",
    ),
    Break(
        "a control term is added to each gradient",
        "engine/engine.py",
        "            masters.add(added)\n",
        "            masters.add([part * 0 for part in added])\n",
        "mpi/test_fedpeptao.py",
    ),
    Break(
        "FedProx pulls to where the round began",
        "engine/engine.py",
        "masters.pull(self._local.proximal)",
        "masters.pull(0.0)",
        "mpi/test_engine.py mpi/test_equivalence.py mpi/test_fedpeptao.py",
    ),
    Break(
        "a frozen value has no gradient",
        "engine/masters.py",
        "        self._absent = list(absent)\n",
        "        self._absent = []\n",
        "mpi/test_importance.py mpi/test_engine.py mpi/test_fibecfed.py",
    ),
    Break(
        "kept moments know how many steps they have made",
        "rounds/local.py",
        "engine.moments(so_far + trained.steps)",
        "engine.moments(trained.steps)",
        "mpi/test_fedpeptao.py",
    ),
    Break(
        "a client counts by its rows",
        "cluster/collectives.py",
        "np.multiply(masked[piece], weight, out",
        "np.multiply(masked[piece], 1, out",
        "mpi/test_collectives.py",
    ),
    Break(
        "a value's weight is that of those who have it",
        "cluster/collectives.py",
        "weight if mask is None else weight * mask",
        "weight",
        "mpi/test_collectives.py",
    ),
    Break(
        "an update that is not finite is left out",
        "cluster/collectives.py",
        "if not np.isfinite(masked).all():",
        "if masked is None:",
        "mpi/test_collectives.py mpi/test_faults.py",
    ),
    Break(
        "all slots are added up",
        "cluster/collectives.py",
        "    for slot in range(1, slots):\n        total",
        "    for slot in range(1, slots - 1):\n        total",
        "mpi/test_collectives.py",
    ),
    Break(
        "what nobody has keeps its value",
        "cluster/collectives.py",
        "    np.copyto(mean, before, where=~has)\n",
        "",
        "mpi/test_collectives.py",
    ),
    Break(
        "what a method freezes does not train (A of FFA-LoRA)",
        "rounds/local.py",
        "            limits.append(~still.mask())\n",
        "            pass\n",
        "mpi/test_sharing.py",
    ),
    Break(
        "personal layers are those that the client has trained",
        "rounds/local.py",
        '"values": now.personal.pack(values)',
        '"values": now.personal.pack(vector)',
        "mpi/test_fibecfed.py",
    ),
    Break(
        "a neuron's Fisher value is smoothed over the rounds",
        "rounds/local.py",
        "sparsity.momentum(old, trained.neurons, gamma)",
        "sparsity.momentum(None, trained.neurons, gamma)",
        "mpi/test_fibecfed.py",
    ),
    Break(
        "easy batches come first",
        "policies/curriculum.py",
        "np.argsort(difficulty, kind",
        "np.argsort(-difficulty, kind",
        "unit/test_curriculum.py",
    ),
    Break(
        "an order is that of measured difficulty",
        "rounds/local.py",
        "measured and difficulty.hardest_first",
        "measured and not difficulty.hardest_first",
        "mpi/test_fibecfed.py mpi/test_curricula.py",
    ),
    Break(
        "layers are chosen after the warm-up, not before",
        "rounds/federation.py",
        "if state.rounds == config.curriculum.warmup:",
        "if state.rounds == 0:",
        "mpi/test_fibecfed.py",
    ),
    Break(
        "each round draws its own clients",
        "rounds/federation.py",
        "sampling.sample(seed, round_number, clients",
        "sampling.sample(seed, 0, clients",
        "mpi/test_equivalence.py",
    ),
    Break(
        "a client that failed keeps what it had",
        "rounds/federation.py",
        "        self.local.accept(now, succeeded)\n",
        "        self.local.accept(now, list(now.clients))\n",
        "mpi/test_sharing.py mpi/test_fedpeptao.py",
    ),
    Break(
        "a round is drawn again at most so many times",
        "rounds/federation.py",
        "if len(earlier) > REDRAWS:",
        "if len(earlier) > REDRAWS + 1:",
        "mpi/test_faults.py",
    ),
    Break(
        "the server's memory is committed",
        "storage/commits.py",
        "for name, value in state.server.vectors.items()}",
        "for name, value in list(state.server.vectors.items())[:0]}",
        "unit/test_commits.py",
    ),
    Break(
        "a line of metrics is on disk before the manifest",
        "storage/files.py",
        "        stream.flush()\n        os.fsync(stream.fileno())\n    return line",
        "        stream.flush()\n    return line",
        "mpi/test_resume.py unit/test_files.py",
    ),
    Break(
        "a rename is on disk",
        "storage/files.py",
        "            os.fsync(descriptor)\n",
        "            pass\n",
        "mpi/test_resume.py unit/test_files.py",
    ),
    Break(
        "noise is added to the sum",
        "privacy/mechanism.py",
        "np.rint(drawn * (deviation * clip / unit(clip)))",
        "np.rint(drawn * 0)",
        "unit/test_privacy.py",
    ),
    Break(
        "each round has noise of its own",
        "privacy/mechanism.py",
        'normals(key, "noise", round_number, size)',
        'normals(key, "noise", 0, size)',
        "unit/test_privacy.py mpi/test_privacy.py",
    ),
    Break(
        "an update is clipped",
        "privacy/mechanism.py",
        "factor = 1.0 if norm <= clip else clip / norm",
        "factor = 1.0",
        "unit/test_privacy.py",
    ),
    Break(
        "the privacy's noise is added before the mean is taken",
        "rounds/exchange.py",
        "            self.guard.close(sums, now.number)\n",
        "            pass\n",
        "mpi/test_privacy.py",
    ),
    Break(
        "a transform acts on the mean",
        "rounds/exchange.py",
        "                mean = transform.on_mean(mean, before, now)\n",
        "                transform.on_mean(mean, before, now)\n",
        "mpi/test_plugins.py",
    ),
    Break(
        "a bottleneck adds to what passes through it",
        "adapters/bottleneck.py",
        "= hidden + self.up(",
        "= 0.7 * hidden + self.up(",
        "unit/test_adapters.py",
    ),
    Break(
        "layers at home are averaged every so many rounds, not each",
        "rounds/exchange.py",
        "(now.number + 1 - warmup) % every == 0",
        "True",
        "mpi/test_sync.py",
    ),
]


def main() -> int:
    """The command line."""
    words = sys.argv[1:]
    green = 0
    for broken in BREAKS:
        if words and not any(word in broken.guarantee for word in words):
            continue
        began = time.monotonic()
        red = first_red(broken)
        green += red is None
        took = time.monotonic() - began
        print(f"| {broken.guarantee} | {red or '**none**'} | {took:.0f} s |", flush=True)
    return 1 if green else 0


def first_red(broken: Break) -> str | None:
    """The first test that fails; None: all pass."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        tree = Path(folder) / "hpcfed"
        shutil.copytree(
            ROOT, tree, ignore=shutil.ignore_patterns(".*", "runs", "build", "*.egg-info", "cells")
        )
        file = tree / "hpcfed" / broken.file
        text = file.read_text()
        assert text.count(broken.old) == 1, (broken.guarantee, text.count(broken.old))
        file.write_text(text.replace(broken.old, broken.new))
        done = subprocess.run(
            [
                sys.executable, "-m", "pytest", "-x", "-q", "-m", "not long", "-p",
                "no:cacheprovider", *(f"tests/{name}" for name in broken.tests.split()),
            ],
            cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
    for line in done.stdout.splitlines():
        if line.startswith(("FAILED ", "ERROR ")):
            return "`" + line.split()[1].removeprefix("tests/") + "`"
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return None


if __name__ == "__main__":
    sys.exit(main())
