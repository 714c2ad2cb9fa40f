"""What a run begins with, as digests, and whether another life of it has the same."""

import hashlib
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpcfed.adapters.base import full_shape
from hpcfed.cluster.topology import Topology
from hpcfed.data import sources
from hpcfed.data.batches import Tokens
from hpcfed.errors import UserError
from hpcfed.model import Prepared
from hpcfed.rounds.preflight import MAY_CHANGE, ROUNDS, Checked
from hpcfed.settings.config import Config
from hpcfed.settings.resolve import leaves
from hpcfed.storage.checks import digest
from hpcfed.storage.commits import Origin
from hpcfed.storage.paths import CONFIG

_SAID = {
    "configuration": "The configuration is not the one that the run in {0} began with: {0}/"
    f"{CONFIG} has been changed since; change it back",
    "deepspeed": "The DeepSpeed JSON has other settings than when the run in {0} began (its "
    "run.json has them); put it back",
    "data": "The data are not those that the run in {0} began with (other rows, labels, or another "
    "order); put them back",
    "tokens": "The tokenizer makes other tokens of the data than when the run in {0} began; put it "
    "back",
    "model": "The model's weights are not those that the run in {0} began with; put them back",
}


def of_input(checked: Checked) -> Origin:
    """Of what there is before a model is loaded."""
    settings = json.dumps(checked.settings, sort_keys=True, default=str)
    return Origin(
        of_config(checked.config), digest(settings.encode()), sources.digest(checked.task)
    )


def of_config(config: Config) -> str:
    """Of a configuration, without what another life may have otherwise."""
    own = {k: v for k, v in leaves(config.to_dict()) if k not in (*MAY_CHANGE, ROUNDS)}
    return digest(json.dumps(own, sort_keys=True).encode())


def of_tokens(*splits: Tokens) -> str:
    """Of what a tokenizer has made of the rows."""
    found = hashlib.sha256()
    for tokens in splits:
        for name in ("ids", "types", "offsets", "labels", "positions", "answers"):
            array = getattr(tokens, name)
            found.update(name.encode())
            found.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
        found.update(str(tokens.pad_id).encode())
    return found.hexdigest()


def of_model(prepared: Prepared, topology: Topology) -> str:
    """Of the frozen weights, and of where the trainable ones start. Collective over the slot, whose
    ranks share the work: under ZeRO-3 each has a shard of every weight, else all have all."""
    found = hashlib.sha256(prepared.initial.numpy().tobytes())
    trained = {id(parameter) for parameter in prepared.adapted.parameters}
    frozen = [p for p in prepared.adapted.network.parameters() if id(p) not in trained]
    rank, ranks = topology.rank_in_slot, topology.ranks_per_client
    for number, parameter in enumerate(frozen):
        shard = getattr(parameter, "ds_tensor", None)
        if shard is None:
            own = parameter if number % ranks == rank else None
        else:  # the last ones are padded
            whole = math.prod(full_shape(parameter)) - rank * shard.numel()
            own = shard.flatten()[: max(0, whole)]
        if own is not None:
            raw: Any = own.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            found.update(raw)
    return digest("".join(topology.slot.allgather(found.hexdigest())).encode())


def compare(began: Origin, now: Origin, output: Path) -> None:
    """Raises UserError unless a life has what the run began with; what is not known yet is not
    compared."""
    then = asdict(began)
    for name, value in asdict(now).items():
        if value and value != then[name]:
            raise UserError(f"{_SAID[name].format(output)}, or give another output=...")


def agree(everyone: list[Origin]) -> None:
    """Raises UserError unless all ranks have begun with the same."""
    first = asdict(everyone[0])
    for other in everyone[1:]:
        name = next((key for key, value in asdict(other).items() if value != first[key]), None)
        if name is not None:
            what = {"tokens": "tokenizer's files", "model": "model's files", "data": "data"}
            raise UserError(
                f"The {what.get(name, name)} differ from host to host; give all hosts the same."
            )
