"""What a run needs in order to go on: from the federation into a commit, and back.

A round exists when its manifest does. Everything else on disk is either reachable from the
manifest or is removed when the run is resumed. Random draws need no state: each is derived from
the seed and what it is for.
"""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hpcfed.rounds.account import Totals
from hpcfed.storage.run import Commit
from hpcfed.storage.states import ClientStates

if TYPE_CHECKING:
    from hpcfed.rounds.federation import Federation


def client_states(federation: "Federation") -> dict[str, ClientStates]:
    """Every kind of state that clients keep, by name."""
    local = federation.local
    kinds = (local.personal, local.lessons, local.moments, federation.controls)
    return {own.kind: own for own in kinds}


def collect(federation: "Federation", rounds: int) -> Commit:
    """The state after `rounds` rounds."""
    server = federation.server.state
    tensors = {"shared": federation.shared, "base": federation.base}
    tensors |= {f"server.{name}": value for name, value in server.tensors.items()}
    best = None
    if federation.best is not None:
        tensors["best"] = federation.best.shared
        best = {
            "round": federation.best.round,
            "score": federation.best.score,
            "shared_blocks": federation.best.shared_blocks,
        }
    content = {
        "shared_blocks": federation.shared_blocks,
        "server_lr": server.lr,
        "best": best,
        "clients": {kind: own.maps() for kind, own in client_states(federation).items()},
        "totals": asdict(federation.account.totals),
        "seconds": {
            "phases": federation.account.seconds,
            "init": federation.earlier_init + federation.init_seconds,
            "total": federation.seconds_so_far,
            "tail": federation.stop.tail,
        },
    }
    # Copies, since the best values may be the current ones, and a file holds each tensor once.
    return Commit(rounds, {name: value.clone() for name, value in tensors.items()}, content)


def restore(federation: "Federation", commit: Commit) -> None:
    """Put a federation that has just been built where `collect` was called."""
    from hpcfed.rounds.federation import Snapshot

    content, tensors = commit.content, commit.tensors
    federation.rounds_done = commit.rounds
    federation.shared, federation.base = tensors["shared"], tensors["base"]
    federation.share(content["shared_blocks"])
    state = federation.server.state
    state.lr = content["server_lr"]
    prefix = "server."
    state.tensors = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
    for kind, own in client_states(federation).items():
        own.restore(content["clients"][kind])
    federation.account.totals = Totals(**content["totals"])
    federation.account.seconds = dict(content["seconds"]["phases"])
    federation.earlier_init = content["seconds"]["init"]
    federation.earlier_lives = content["seconds"]["total"]
    federation.stop.tail = content["seconds"]["tail"]
    best: dict[str, Any] | None = content["best"]
    if best is not None:
        federation.best = Snapshot(
            tensors["best"],
            tuple(best["shared_blocks"]),
            dict(federation.local.personal.pinned),
            best["round"],
            best["score"],
        )
