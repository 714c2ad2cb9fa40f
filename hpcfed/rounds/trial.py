"""A trial step: what would fail in the first step of some client fails before the run begins.

The longest and the shortest row go through model, adapter, objective, loss and backward, in the
engine that will train and at its ZeRO stage, and through prediction. Nothing is left of it:
every client begins with Engine.load, and torch's random state is put back.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from hpcfed.adapters.layout import HEAD
from hpcfed.data.batches import Ids, Tokens
from hpcfed.engine.engine import Engine
from hpcfed.engine.failures import ClientError
from hpcfed.errors import UserError, reason
from hpcfed.settings.config import Config
from hpcfed.settings.counts import VIRTUAL


def try_step(
    config: Config, engine: Engine, initial: torch.Tensor, train: Tokens, test: Tokens
) -> None:
    """One step from the initial values (layout.size,).

    Collective. Raises UserError, on all ranks, for what the model cannot do.
    """
    topology = engine.topology
    by_fisher = config.curriculum.pace != "all" and config.curriculum.difficulty == "fisher"
    observe = config.sparsity.keep < 1 or by_fisher
    problem = ""
    on_gpu = [topology.device] if topology.device.type == "cuda" else []
    with torch.random.fork_rng(devices=on_gpu):
        try:
            problem = _step(engine, initial, train, test, observe)
        except ClientError as error:
            problem = str(error)
        except Exception as error:  # whatever a model raises
            problem = reason(error)
    if engine.interrupted:  # by a signal: the round loop sees to it
        problem = ""
    with topology.world.agreement("making a trial step"):
        if problem:
            raise UserError(_sentence(config, engine, problem, int(train.lengths.max())))


def _step(engine: Engine, initial: torch.Tensor, train: Tokens, test: Tokens, observe: bool) -> str:
    """What is wrong, or ""."""
    ranks = engine.topology.ranks_per_client
    engine.load(initial)
    with engine.failures.silent(), _reached(engine) as reached:
        # All ranks get both rows: what fails in backward fails on all of them.
        engine.train([np.tile(_ends(train), ranks)], train, 0, observe)
    adapter = {i for i, entry in enumerate(engine.layout.trained.entries) if entry.block != HEAD}
    if not reached & adapter:
        return "no gradient reaches the adapter"
    for tokens in (train, test):
        # A row alone is another case than a row beside a longer one.
        shortest = _ends(tokens)[1:]
        with engine.failures.silent():
            _, problem = engine.predict([*[_ends(tokens)] * ranks, *[shortest] * ranks], tokens)
        if problem:
            return problem
    return ""


def _ends(tokens: Tokens) -> Ids:
    """The longest row, and the shortest."""
    return np.array([tokens.lengths.argmax(), tokens.lengths.argmin()], dtype=np.int64)


@contextmanager
def _reached(engine: Engine) -> Iterator[set[int]]:
    """The parameters that get a gradient other than zero meanwhile, by their places."""
    reached: set[int] = set()

    def note(index: int, gradient: torch.Tensor) -> None:
        if gradient.any():
            reached.add(index)

    handles = [
        parameter.register_hook(functools.partial(note, index))  # type: ignore[no-untyped-call]
        for index, parameter in enumerate(engine.parameters)
    ]
    try:
        yield reached
    finally:
        for handle in handles:
            handle.remove()


def _sentence(config: Config, engine: Engine, problem: str, longest: int) -> str:
    """The fault and its mend."""
    kind = config.adapter.kind
    network: Any = engine.model.backbone
    inner = network.get_base_model() if hasattr(network, "get_base_model") else network
    mends: Sequence[str] = [f"give another model than {config.model.name!r}"]
    if kind in VIRTUAL:
        mends = ["use adapter.kind=lora", *mends]
    if "index out of range" in problem or "device-side assert" in problem:
        mends = [f"lower task.max_length (the longest text has {longest} tokens)", *mends]
    if "memory" in problem.lower():
        mends = [
            "lower local.micro_batch or task.max_length, or use ds_configs/zero3.json with more "
            "cluster.ranks_per_client"
        ]
    return (
        f"A trial step of {type(inner).__name__} with adapter.kind={kind} and "
        f"model.head={config.model.head} fails ({problem}): {', or '.join(mends)}."
    )
