"""Cases: whole runs on the slots of a world."""

import contextlib
import io
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from hpcfed.app import cli
from hpcfed.cluster.topology import Topology
from hpcfed.policies import sparsity
from hpcfed.round import Round
from hpcfed.rounds.federation import Federation
from hpcfed.rounds.local import LocalRounds
from hpcfed.rounds.preflight import check
from hpcfed.rounds.progress import Progress
from hpcfed.rounds.setup import set_up
from hpcfed.settings.resolve import resolve
from tests.support import line


def federate(
    topology: Topology, folder: Path, runs: dict[str, list[str]], preset: str = "lora-fedavg",
    lost: tuple[tuple[int, int], ...] = (),
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Run name -> overrides, one after the other, into folder/name. lost: (round, client), from 0,
    whose update cannot be sent.

    For each run: `values` and `initial` (layout.size,), without personal ones, on rank 0; and the
    `masks` that this slot's clients trained under, by (round, client), on the slot's first rank.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, overrides in runs.items():
        out = folder / name
        clear(topology, out)
        with watched(lost) as masks:
            federation = build(topology, preset, [*overrides, f"output={out}"])
            federation.run(Progress(speaks=False))
        found[name] = {"masks": masks} if topology.leads_slot else {}
        if topology.is_root:
            found[name] |= {
                "values": federation.state.values.numpy(),
                "initial": federation.setup.prepared.initial.numpy(),
            }
    return found


def clear(topology: Topology, out: Path) -> None:
    """Remove what an attempt that failed has left."""
    if topology.is_root:
        shutil.rmtree(out, ignore_errors=True)
    topology.world.comm.Barrier()


def build(
    topology: Topology, preset: str, overrides: list[str], resume: bool = False
) -> Federation:
    """A federation that is ready to run."""
    form = f"cluster.ranks_per_client={topology.ranks_per_client}"
    _, source, *words = line(["run", preset, *overrides, form])
    resolved = resolve(source, words)
    checked = check(resolved, topology.world.size, resume)
    return Federation(set_up(checked, topology.world, time.monotonic(), topology))


@contextlib.contextmanager
def watched(lost: tuple[tuple[int, int], ...]) -> Iterator[dict[tuple[int, int], np.ndarray]]:
    """Keep every mask that a client trains under, by round and client; spoil the lost updates."""
    run, trainable = LocalRounds.run, sparsity.trainable
    masks: dict[tuple[int, int], np.ndarray] = {}
    now = (0, 0)

    def noting(rounds: LocalRounds, client: int, own: Round, *rest: Any) -> Any:
        nonlocal now
        now = (own.number, client)
        done = run(rounds, client, own, *rest)
        if now in lost:
            assert done.values is not None
            done.values.fill_(np.inf)
        return done

    def recording(layout: Any, *rest: Any) -> Any:
        mask = trainable(layout, *rest)
        masks[now] = np.ones(layout.size, bool) if mask is None else mask.numpy()
        return mask

    with patch.object(LocalRounds, "run", noting), patch.object(sparsity, "trainable", recording):
        yield masks


def command_line(
    topology: Topology, words: list[str], variables: dict[str, str] | None = None
) -> tuple[int, str, str]:
    """`hpcfed` with these words on every rank: its exit code, and what it printed on both streams.
    variables: of the environment; what is empty is not there."""
    given = variables or {}
    output, problems = io.StringIO(), io.StringIO()
    with (
        patch.dict(os.environ, {name: value for name, value in given.items() if value}),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(problems),
    ):
        for name, value in given.items():
            if not value:
                os.environ.pop(name, None)
        try:
            code = cli.main(line(words), listen=False)
        except SystemExit as ended:
            code = int(ended.code or 0)
    return code, output.getvalue(), problems.getvalue()
