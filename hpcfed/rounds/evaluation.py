"""Personal and global evaluation, spread over the slots.

personal: each client's own model on its own rows, predictions pooled into one metric.
global: the shared values, elsewhere those that everyone starts from, on all rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hpcfed.cluster.collectives import sum_over_ranks
from hpcfed.cluster.topology import Topology
from hpcfed.data import answers
from hpcfed.data.batches import Floats, Ids, Tokens
from hpcfed.data.sources import TaskData
from hpcfed.engine import generation
from hpcfed.engine.engine import Engine
from hpcfed.errors import RunError, reason
from hpcfed.objectives.completion import Completion
from hpcfed.policies.sampling import spread


@dataclass(frozen=True)
class Evaluation:
    """Metrics, and the first thing that the head tells of each evaluated row, as the predicted
    class; rows ascending. left_out: clients of which rows could not be evaluated, and why; these
    rows are in none of the others. written: answers to these rows, if some were to be."""

    scores: dict[str, Any]
    rows: Ids
    told: Floats
    left_out: dict[int, str]
    written: list[str] | None = None


@dataclass(frozen=True)
class Evaluator:
    """Evaluates models that are given as vectors of trainable values. needed: clients that must
    come through. longest: tokens of an answer that is written; 0: none are."""

    engine: Engine
    task: TaskData
    topology: Topology
    batch_size: int
    needed: int = 1
    longest: int = 0

    def evaluate(
        self,
        rows: Sequence[Ids],
        tokens: Tokens,
        states: Mapping[int, int],
        vector_of: Callable[[int | None], torch.Tensor],
        writes: bool = False,
    ) -> Evaluation:
        """rows[k]: rows of client k. states: clients with values of their own; all others have
        the same model, vector_of(None), and their rows are evaluated together; without states this
        is the global evaluation. writes: also write the answers, if this run does.

        Raises RunError, on all ranks, if fewer clients than `needed` could be evaluated at all.
        """
        results = np.zeros((1 + len(self.engine.head.columns), len(tokens)))
        # Row -> token ids; None: no answers are written.
        written: dict[int, list[int]] | None = {} if writes and self.longest else None
        problems: dict[int | None, str] = {}
        alike = [rows[k] for k in range(len(rows)) if k not in states]
        if alike:
            batches = self._batches(np.concatenate(alike), tokens)
            mine = batches[self.topology.slot_index :: self.topology.slots]
            problems[None] = self._run(mine, tokens, vector_of, None, results, written)
        lanes = spread({k: len(rows[k]) for k in states if len(rows[k])}, self.topology.slots)
        for k in lanes[self.topology.slot_index]:
            own = self._batches(rows[k], tokens)
            problems[k] = self._run(own, tokens, vector_of, k, results, written)
        results = sum_over_ranks(results, self.topology)
        left_out = self._left_out(rows, results[0] > 0, problems)
        every = np.sort(np.concatenate(list(rows)))
        seen = every[results[0, every] > 0]
        told = results[1:, seen]
        scores = self.engine.head.score(told, seen, tokens, self.task)
        if written is None:
            return Evaluation(scores, seen, told[0], left_out)
        texts = self._texts(written, seen)
        scores |= answers.score(texts, [tokens.right[row] for row in seen])
        return Evaluation(scores, seen, told[0], left_out, texts)

    def _texts(self, written: dict[int, list[int]], rows: Ids) -> list[str]:
        """The answers to these rows, whichever rank wrote them."""
        head = self.engine.head
        assert isinstance(head, Completion)
        mine = {row: head.template.text(ids) for row, ids in written.items()}
        every: dict[int, str] = {}
        for part in self.topology.world.comm.allgather(mine):
            every |= part
        return [every[row] for row in rows.tolist()]

    def _left_out(
        self, rows: Sequence[Ids], seen: npt.NDArray[np.bool_], problems: dict[int | None, str]
    ) -> dict[int, str]:
        """Clients with rows that nobody has seen, and why; the same on all ranks."""
        short = [k for k, own in enumerate(rows) if not seen[own].all()]
        if not short:
            return {}
        told: dict[int | None, str] = {}
        for part in self.topology.world.comm.allgather(problems):
            told |= {k: text for k, text in part.items() if text}
        left_out = {k: told.get(k) or told.get(None) or "not evaluated by any slot" for k in short}
        clients = sum(len(own) > 0 for own in rows)
        able = sum(bool(seen[own].any()) for own in rows)
        if able < min(self.needed, clients):
            k, why = next(iter(left_out.items()))
            raise RunError(
                f"Of {clients} clients {able} could be evaluated, and {self.needed} must be "
                f"(federation.min_clients); client {k}: {why}. What is committed is kept: mend the "
                "cause and go on with --resume."
            )
        return left_out

    def _batches(self, rows: Ids, tokens: Tokens) -> list[Ids]:
        ordered = rows[np.argsort(tokens.lengths[rows], kind="stable")]
        return [ordered[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]

    def _run(
        self,
        batches: list[Ids],
        tokens: Tokens,
        vector_of: Callable[[int | None], torch.Tensor],
        client: int | None,
        results: Floats,
        written: dict[int, list[int]] | None,
    ) -> str:
        """Add what these batches come to, and the answers if they are to be written; why some could
        not be evaluated, or ""."""
        if not batches:
            return ""
        self.topology.world.watch.doing(
            "evaluating" if client is None else f"evaluating client {client}"
        )
        try:
            self.engine.rehearsal.enter("evaluate", client=client)
            vector = vector_of(client)
        except Exception as error:
            return reason(error)
        self.engine.load(vector)
        told, problem = self.engine.predict(batches, tokens)
        if written is not None:
            head = self.engine.head
            assert isinstance(head, Completion)
            found, failed = generation.write(self.engine, batches, tokens, head.ends, self.longest)
            lost = [row for row in np.flatnonzero(told[0]) if row not in found]
            told[:, lost] = 0
            written |= found
            problem = problem or failed
        results += told
        return problem
