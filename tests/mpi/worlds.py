"""The same runs in worlds of several shapes."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from tests.mpi.variants import write_data
from tests.support import many_runs

World = tuple[int, int]  # slots, ranks per client


def run_worlds(
    factory: pytest.TempPathFactory,
    worlds: Mapping[World, Sequence[str]],
    overrides: Callable[[Path, str], list[str]],
    preset: str = "lora-fedavg",
    prepare: Callable[[Path], None] = lambda out: None,
) -> dict[World, Path]:
    """World -> a folder with the data, what `prepare` puts there, and one run for each of the
    world's cases, named like it with - for :."""
    folders = {}
    for (slots, ranks_per_client), cases in worlds.items():
        out = factory.mktemp(f"world-{slots}x{ranks_per_client}")
        write_data(out)
        prepare(out)
        runs = {case.replace(":", "-"): overrides(out, case) for case in cases}
        many_runs(out, slots, ranks_per_client, runs, preset)
        folders[slots, ranks_per_client] = out
    return folders
