"""A run's state as what a commit writes, and back: tensors by name, and what JSON can hold.

A round exists when its manifest does. Everything else on disk is either reachable from the
manifest or is removed when the run is resumed.
"""

from dataclasses import asdict
from typing import Any

import torch

from hpcfed.state import Best, ClientFiles, RunState, Seconds, ServerState, Totals

FORMAT = 2  # of the manifest

_SERVER = "server."


def encode(state: RunState) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, content) of a state."""
    tensors = {"values": state.values}
    tensors |= {f"{_SERVER}{name}": value for name, value in state.server.vectors.items()}
    best = None
    if state.best is not None:
        tensors["best"] = state.best.values
        best = {"round": state.best.round, "score": state.best.score}
    content = {
        "format": FORMAT,
        "rounds": state.rounds,
        "shared_blocks": state.chosen,
        "server_lr": state.server.lr,
        "best": best,
        "clients": {kind: asdict(files) for kind, files in state.clients.items()},
        "totals": asdict(state.totals),
        "seconds": asdict(state.seconds),
    }
    # Copies, since the best values may be the current ones, and a file holds each tensor once.
    return {name: value.clone() for name, value in tensors.items()}, content


def decode(tensors: dict[str, torch.Tensor], content: dict[str, Any]) -> RunState:
    """The state that `encode` was given. Raises ValueError for another format, KeyError for what
    is missing."""
    if content["format"] != FORMAT:
        raise ValueError(f"its format is {content['format']}, and this hpcfed reads {FORMAT}")
    vectors = {
        name.removeprefix(_SERVER): value
        for name, value in tensors.items()
        if name.startswith(_SERVER)
    }
    best = content["best"]
    return RunState(
        values=tensors["values"],
        chosen=tuple(content["shared_blocks"]),
        server=ServerState(content["server_lr"], vectors),
        rounds=content["rounds"],
        best=None if best is None else Best(best["round"], best["score"], tensors["best"]),
        clients={kind: _files(maps) for kind, maps in content["clients"].items()},
        totals=Totals(**content["totals"]),
        seconds=Seconds(**content["seconds"]),
    )


def _files(maps: dict[str, dict[str, int]]) -> ClientFiles:
    """JSON's keys are texts."""
    current, pinned = (
        {int(client): round_number for client, round_number in maps[name].items()}
        for name in ("current", "pinned")
    )
    return ClientFiles(current, pinned)
