"""Answers written by a slot's engine, token by token, each the likeliest: greedy decoding.

Prompts of a batch are padded on the left, so that all answers go on from the last column; positions
count real tokens only, so that a prompt reads as it would alone. Keys and values of what was read
are kept.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import DynamicCache

from hpcfed.data.batches import Ids, Tokens
from hpcfed.engine.engine import Engine

_ENDED, _GOING, _FAILED = range(3)


class Answers:
    """The answers to a batch of prompts, as far as they are written. ends: tokens that end one."""

    def __init__(
        self,
        prompts: Sequence[npt.NDArray[np.int32]],
        ends: Sequence[int],
        pad_id: int,
        device: torch.device,
    ) -> None:
        longest = max(map(len, prompts))
        ids = np.full((len(prompts), longest), pad_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = prompt
            mask[row, longest - len(prompt) :] = 1
        self._ids = torch.from_numpy(ids).to(device)  # not yet read
        self._mask = torch.from_numpy(mask).to(device)
        self._past = DynamicCache()
        self._ends = torch.tensor(ends, device=device)
        self._ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        self._written: list[torch.Tensor] = []

    def step(self, network: Any) -> bool:
        """Write a token of each; whether all have ended. An answer that has ended goes on to be
        written, and what follows its end is not looked at."""
        logits = network(input_ids=self._ids, attention_mask=self._mask, past=self._past)
        token = logits[:, 0].argmax(-1)
        self._written.append(token)
        self._ended |= torch.isin(token, self._ends)
        self._ids = token.unsqueeze(1)
        self._mask = torch.cat([self._mask, torch.ones_like(self._ids)], dim=1)
        return bool(self._ended.all())

    def ids(self) -> list[list[int]]:
        """Token ids of each, without the one that ended it."""
        ends = set(self._ends.tolist())
        found = []
        for row in torch.stack(self._written, dim=1).tolist():
            stop = next((place for place, token in enumerate(row) if token in ends), len(row))
            found.append(row[:stop])
        return found


@torch.no_grad()
def write(
    engine: Engine, batches: Sequence[Ids], tokens: Tokens, ends: Sequence[int], longest: int
) -> tuple[dict[int, list[int]], str]:
    """Row -> its last answer as the engine's values write it, at most `longest` token ids; and why
    some are missing, or "".

    The ranks of the slot take the batches in turns, as in Engine.predict; each returns its own.
    """
    assert tokens.positions is not None
    engine.probing()
    topology = engine.topology
    ranks, rank = topology.ranks_per_client, topology.rank_in_slot
    found: dict[int, list[int]] = {}
    problem = ""
    for start in range(0, len(batches), ranks):
        mine = start + rank
        rows = batches[mine if mine < len(batches) else start]
        prompts = [tokens.row(row)[: tokens.positions[row]] for row in rows]
        answers = Answers(prompts, ends, tokens.pad_id, topology.device)
        state = _GOING
        for _ in range(longest):
            topology.world.watch.moves()
            try:
                state = _ENDED if answers.step(engine.model) else _GOING
            except Exception as error:
                problem, state = problem or engine.failures.told(error), _FAILED
            if engine.stage == 3 and ranks > 1:
                # Each forward gathers parameters from all: as many as the longest answer takes.
                state = topology.slot.allreduce(state, op=topology.world.mpi.MAX)
            if state != _GOING:
                break
        if state != _FAILED and mine < len(batches):
            found |= zip(rows.tolist(), answers.ids(), strict=True)
    return found, problem
