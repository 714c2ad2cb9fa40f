"""The small federations that the cluster tests run: 4 ranks = 4 slots, both systems."""

from pathlib import Path

from tests.mpi.variants import FIBECFED

RANKS = 4

SMALL = [own for own in FIBECFED if not own.startswith("federation.per_round")]
SMALL += ["federation.per_round=4", "evaluation.every=2", "data.validation=0.2"]

METHODS = {
    "fibecfed": SMALL,
    "fedpeptao": [
        *(own for own in SMALL if not own.startswith(("curriculum", "sparsity"))),
        "curriculum.warmup=1", "adapter.virtual_tokens=4",
    ],
}  # fmt: skip

# Long enough to be disturbed a few times.
LONG = [*METHODS["fibecfed"], "federation.rounds=32", "evaluation.every=8"]


def words(method: str, shared: Path, name: str, *extra: str) -> list[str]:
    """Overrides of a run of `method` in the folder shared/name."""
    return [*METHODS[method], f"data.root={shared}", f"output={shared / name}", *extra]
