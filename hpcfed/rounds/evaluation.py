"""Personal and global evaluation, spread over the slots.

personal: each client's own model on its own rows, predictions pooled into one metric.
global: the shared values, elsewhere those that everyone starts from, on all rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hpcfed.cluster.collectives import sum_over_ranks
from hpcfed.cluster.topology import Topology
from hpcfed.data.batches import Floats, Ids, Tokens
from hpcfed.data.sources import TaskData
from hpcfed.engine.engine import Engine
from hpcfed.policies.sampling import spread


@dataclass(frozen=True)
class Evaluation:
    """Metrics, and the first thing that the head tells of each evaluated row, as the predicted
    class; rows ascending."""

    scores: dict[str, Any]
    rows: Ids
    told: Floats


@dataclass(frozen=True)
class Evaluator:
    """Evaluates models that are given as vectors of trainable values."""

    engine: Engine
    task: TaskData
    topology: Topology
    batch_size: int

    def evaluate(
        self,
        rows: Sequence[Ids],
        tokens: Tokens,
        states: Mapping[int, int],
        vector_of: Callable[[int | None], torch.Tensor],
    ) -> Evaluation:
        """rows[k]: rows of client k. states: clients with values of their own; all others have
        the same model, vector_of(None), and their rows are evaluated together; without states this
        is the global evaluation."""
        results = np.zeros((1 + len(self.engine.head.columns), len(tokens)))
        alike = [rows[k] for k in range(len(rows)) if k not in states]
        if alike:
            batches = self._batches(np.concatenate(alike), tokens)
            mine = batches[self.topology.slot_index :: self.topology.slots]
            self._run(mine, tokens, vector_of(None), results)
        lanes = spread({k: len(rows[k]) for k in states if len(rows[k])}, self.topology.slots)
        for k in lanes[self.topology.slot_index]:
            self._run(self._batches(rows[k], tokens), tokens, vector_of(k), results)
        return self._score(np.sort(np.concatenate(list(rows))), tokens, results)

    def _batches(self, rows: Ids, tokens: Tokens) -> list[Ids]:
        ordered = rows[np.argsort(tokens.lengths[rows], kind="stable")]
        return [ordered[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]

    def _run(
        self,
        batches: list[Ids],
        tokens: Tokens,
        vector: torch.Tensor,
        results: np.ndarray[Any, np.dtype[np.float64]],
    ) -> None:
        if batches:
            self.engine.load(vector)
            results += self.engine.predict(batches, tokens)

    def _score(
        self, rows: Ids, tokens: Tokens, results: np.ndarray[Any, np.dtype[np.float64]]
    ) -> Evaluation:
        seen, *told = sum_over_ranks(results, self.topology)[:, rows]
        if not seen.all():
            raise RuntimeError(f"{int((seen == 0).sum())} rows were not evaluated by any slot")
        scores = self.engine.head.score(np.stack(told), rows, tokens, self.task)
        return Evaluation(scores, rows, told[0])
