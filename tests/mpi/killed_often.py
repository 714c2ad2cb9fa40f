"""Program: one run, killed again and again, and resumed each time, until it is complete.

usage: killed_often.py KILLS SEED ARGUMENTS...

Each life is a fork of this process, which has loaded everything but MPI: it begins its rounds after
a second and not after ten. SIGKILL comes at a seeded instant after the life has begun; a life that
has ended before is no kill. Prints the number of kills and how many rounds were committed at each.
"""

import importlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from hpcfed.app import cli
from hpcfed.app.run import quiet

LOADED = ("torch", "deepspeed", "peft", "hpcfed.rounds.federation", "hpcfed.rounds.setup",
          "transformers.models.bert.modeling_bert")  # fmt: skip
LONGEST = 4.0  # seconds that a life gets at most


def life(words: list[str]) -> int:
    """A process that runs or resumes."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            code = cli.main([*words, "--resume"])
        finally:
            os._exit(code)
    return pid


def main() -> None:
    """Kill until there were enough, then let it end."""
    kills, rng, words = int(sys.argv[1]), random.Random(int(sys.argv[2])), sys.argv[3:]
    quiet()
    for name in LOADED:
        importlib.import_module(name)
    (out,) = (Path(w.removeprefix("output=")) for w in words if w.startswith("output="))
    manifest = out / "checkpoint" / "manifest.json"
    done: list[int] = []
    while len(done) < kills:
        pid = life(words)
        time.sleep(rng.uniform(0.0, LONGEST))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status):
            sys.exit(
                f"it ended by itself after {done}: exit code {os.waitstatus_to_exitcode(status)}"
            )
        done.append(json.loads(manifest.read_text())["rounds"] if manifest.exists() else -1)
    _, status = os.waitpid(life(words), 0)
    print(json.dumps(done))
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
