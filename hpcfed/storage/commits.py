"""A run's state as what a commit writes, and back.

    checkpoint/round-00012.safetensors   the tensors of the commit after round 12
    checkpoint/manifest.json             what the last commit consists of
    checkpoint/previous.json             the manifest of the one before, which is kept whole too

A round exists when its manifest does. Everything else on disk is either reachable from the
manifest or is removed when the run is resumed.

All that a manifest refers to is sealed. The manifest itself, by a digest of its content; the
tensors, partition.json, selection.json and the committed part of metrics.jsonl, by digests in the
manifest. A client's file carries its digest in its own header (clients.py): it is written once, by
the slot that ran the client, so a commit need not know it. All that a commit holds of a client is
the round of its file, 16 bytes among the tensors, and nothing travels between ranks for it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hpcfed.state import (
    KINDS,
    PHASES,
    Best,
    ClientFiles,
    PrivacyState,
    RunState,
    Seconds,
    ServerState,
    Totals,
)
from hpcfed.storage.checks import as_object, digest, parse
from hpcfed.storage.paths import PARTITION, SELECTION, tensors_of

FORMAT = 5  # of the manifest

_SERVER, _CLIENTS = "server.", "clients."
_TABLES = ("current", "pinned", "replaced")  # of ClientFiles


class FormatError(ValueError):
    """A manifest of another hpcfed."""


@dataclass(frozen=True)
class Origin:
    """What a run began with, as digests; it goes on with the same.

    configuration: without what another life may have otherwise. data: the rows, in order. tokens:
    what the tokenizer made of them. model: the frozen weights, and where the trainable ones start.
    """

    configuration: str
    deepspeed: str
    data: str
    tokens: str = ""
    model: str = ""


@dataclass(frozen=True)
class BestRound:
    """Of Best, what is no tensor."""

    round: int
    score: float


@dataclass(frozen=True)
class Committed:
    """The part of a file that is committed."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A commit. run: a name of its own, which its clients' files bear too. planned: rounds that the
    run was to have. files: name -> digest."""

    run: str
    began: Origin
    planned: int
    rounds: int
    shared_blocks: tuple[str, ...]
    server_lr: float
    best: BestRound | None
    totals: Totals
    seconds: Seconds
    privacy: PrivacyState | None
    agreement: tuple[float, ...]
    metrics: Committed
    files: dict[str, str]


def encode(state: RunState) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, fields of the manifest) of a state."""
    tensors = {"values": state.values}
    tensors |= {f"{_SERVER}{name}": value for name, value in state.server.vectors.items()}
    best = None
    if state.best is not None:
        tensors["best"] = state.best.values
        best = {"round": state.best.round, "score": state.best.score}
    for kind, files in state.clients.items():
        for table in _TABLES:
            rows = getattr(files, table)
            pairs = sorted(rows.items() if isinstance(rows, dict) else rows)
            if pairs:
                tensors[f"{_CLIENTS}{kind}.{table}"] = torch.tensor(pairs)
    fields = {
        "rounds": state.rounds,
        "shared_blocks": list(state.chosen),
        "server_lr": state.server.lr,
        "best": best,
        "totals": asdict(state.totals),
        "seconds": asdict(state.seconds),
        "privacy": None if state.privacy is None else asdict(state.privacy),
        "agreement": list(state.agreement),
    }
    # Copies, since the best values may be the current ones, and a file holds each tensor once.
    return {name: value.clone() for name, value in tensors.items()}, fields


def decode(tensors: Mapping[str, torch.Tensor], manifest: Manifest) -> RunState:
    """The state that `encode` was given. Raises ValueError, which says what is wrong with the
    tensors."""
    left = dict(tensors)
    values = _vector(left, "values")
    best = None
    if manifest.best is not None:
        best = Best(manifest.best.round, manifest.best.score, _vector(left, "best", len(values)))
    vectors = {
        name.removeprefix(_SERVER): _vector(left, name, len(values))
        for name in tensors
        if name.startswith(_SERVER)
    }
    clients = {kind: ClientFiles() for kind in KINDS}
    for kind, files in clients.items():
        for table in _TABLES:
            pairs = _pairs(left, f"{_CLIENTS}{kind}.{table}", manifest.rounds)
            if table == "replaced":
                files.replaced = set(pairs)
            elif len(dict(pairs)) < len(pairs):
                raise ValueError(f"holds a client twice in {_CLIENTS}{kind}.{table}")
            else:
                setattr(files, table, dict(pairs))
    if left:
        raise ValueError(f"holds {min(left)!r}, which does not belong there")
    return RunState(
        values=values,
        chosen=manifest.shared_blocks,
        server=ServerState(manifest.server_lr, vectors),
        rounds=manifest.rounds,
        best=best,
        clients=clients,
        totals=manifest.totals,
        seconds=manifest.seconds,
        privacy=manifest.privacy,
        agreement=manifest.agreement,
    )


def _vector(tensors: dict[str, torch.Tensor], name: str, size: int | None = None) -> torch.Tensor:
    """(size,) fp32, all finite; it is taken out of the tensors."""
    vector = tensors.pop(name, None)
    if vector is None:
        raise ValueError(f"holds no {name!r}")
    if vector.dtype != torch.float32 or vector.dim() != 1 or size not in (None, len(vector)):
        raise ValueError(f"holds {name!r} as {vector.dtype} {tuple(vector.shape)}")
    if not bool(torch.isfinite(vector).all()):
        raise ValueError(f"holds values in {name!r} that are not finite")
    return vector


def _pairs(tensors: dict[str, torch.Tensor], name: str, rounds: int) -> list[tuple[int, int]]:
    """(client, round) of each row of a table, if there is one."""
    table = tensors.pop(name, None)
    if table is None:
        return []
    if table.dtype != torch.int64 or table.dim() != 2 or table.shape[1] != 2:
        raise ValueError(f"holds {name!r} as {table.dtype} {tuple(table.shape)}")
    if len(table) and (int(table.min()) < 0 or int(table[:, 1].max()) >= rounds):
        raise ValueError(f"holds rounds in {name!r} that were not committed")
    return [(client, number) for client, number in table.tolist()]


def seal(fields: Mapping[str, Any]) -> bytes:
    """manifest.json, from the fields of a Manifest."""
    content = {"format": FORMAT, **fields}
    return (json.dumps({**content, "sha256": _digest(content)}, indent=1) + "\n").encode()


def unseal(content: bytes) -> Manifest:
    """The manifest that was sealed. Raises FormatError for one of another hpcfed, and ValueError,
    which says what is wrong with it."""
    tree = as_object(content)
    number = tree.get("format")
    if type(number) is int and number != FORMAT:
        raise FormatError(f"its format is {number}, and this hpcfed reads {FORMAT}")
    if tree.pop("sha256", None) != _digest(tree):
        raise ValueError("its content is not what its checksum says")
    if tree.pop("format", None) != FORMAT:
        raise ValueError("it has no format")
    manifest: Manifest = parse(Manifest, tree)
    named = {tensors_of(manifest.rounds), PARTITION}
    faults = {
        f"rounds is {manifest.rounds} of {manifest.planned}": manifest.rounds > manifest.planned,
        "best.round is none of its rounds": manifest.best is not None
        and manifest.best.round >= manifest.rounds,
        "seconds.phases are not those of a run": set(manifest.seconds.phases) != set(PHASES),
        "files are not those of a commit": not (
            named <= set(manifest.files) <= {*named, SELECTION}
        ),
    }
    fault = next((text for text, found in faults.items() if found), None)
    if fault is not None:
        raise ValueError(fault)
    return manifest


def _digest(tree: Mapping[str, Any]) -> str:
    return digest(json.dumps(tree, sort_keys=True).encode())
