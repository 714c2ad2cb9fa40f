"""What a run comes to: validation on the way, the test split at the end."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from hpcfed.adapters.layout import HEAD
from hpcfed.data import metrics
from hpcfed.data.batches import Ids, Tokens
from hpcfed.data.instructions import Example
from hpcfed.policies.sharing import Sharing
from hpcfed.rng import generator
from hpcfed.round import Round
from hpcfed.rounds.account import Account
from hpcfed.rounds.evaluation import Evaluation, Evaluator
from hpcfed.rounds.exchange import Exchange
from hpcfed.rounds.setup import Setup
from hpcfed.state import Best
from hpcfed.storage.states import ClientStates


class Results:
    """Evaluates the run's state. `personal`: the files of values that stay home."""

    def __init__(
        self,
        setup: Setup,
        personal: ClientStates,
        account: Account,
        sharing: Sharing,
        exchange: Exchange,
    ) -> None:
        self._setup, self._state = setup, setup.state
        self._personal, self._account = personal, account
        self._sharing, self._exchange = sharing, exchange
        self._evaluator = Evaluator(
            setup.engine,
            setup.task,
            setup.topology,
            setup.config.evaluation.batch_size,
            setup.config.federation.min_clients,
            setup.config.evaluation.max_new_tokens or 0,
        )
        clients, number = len(setup.rows), setup.config.evaluation.clients
        rng = generator(setup.config.seed, "evaluation")
        sampled = number is not None and number < clients
        self._asked = set(rng.choice(clients, number, replace=False)) if sampled else None

    def vector(
        self,
        client: int | None,
        now: Round | None = None,
        values: torch.Tensor | None = None,
        files: Mapping[int, int] | None = None,
    ) -> torch.Tensor:
        """All trainable values (layout.size,) of a client: the shared ones, and its personal ones,
        or those everyone starts from; zero where it has none. By default the current ones; else of
        these values and files. now: the round it is for, None: after it."""
        vector = (self._state.values if values is None else values).clone()
        if client is None:
            return vector
        tensors = self._personal.load(client, files)
        if tensors is not None:
            self._sharing.personal(self._state.chosen).unpack(tensors["values"], vector)
        has = self._exchange.has(client, now)
        return vector if has is None else torch.where(has, vector, 0.0)

    def validate(self, record: dict[str, Any]) -> None:
        """Where it is time for it, validation metrics of the current values, into the round's
        record; remembers the best round."""
        state, config = self._state, self._setup.config
        last = state.rounds == self._setup.rounds
        if not last and state.rounds % config.evaluation.every:
            return
        clock = time.monotonic()
        rows = self._of_asked([r.validation for r in self._setup.rows])
        if sum(map(len, rows)):
            results = self._evaluate(
                rows, self._setup.train_tokens, state.values, self._personal.files.current,
                config.evaluation.generate_in_validation,
            )  # fmt: skip
            record["validation"] = {name: result.scores for name, result in results.items()}
            record |= _left_out(results)
            score = results["personal"].scores["score"]
            if np.isfinite(score) and (state.best is None or score > state.best.score):
                self._personal.pin()
                state.best = Best(state.rounds - 1, score, state.values)
        self._account.evaluated(time.monotonic() - clock, record)

    def _of_asked(self, rows: list[Ids]) -> list[Ids]:
        """No rows of clients that are not in the sample for evaluation."""
        if self._asked is None:
            return rows
        return [own if k in self._asked else own[:0] for k, own in enumerate(rows)]

    def _evaluate(
        self,
        rows: list[Ids],
        tokens: Tokens,
        values: torch.Tensor,
        files: Mapping[int, int],
        writes: bool,
    ) -> dict[str, Evaluation]:
        """Personal and global results on rows[k] of every client k; one pass if they coincide.
        files: client -> round of its personal values. writes: answers too, if this run does."""
        # Where clients have different values each is evaluated by itself.
        apart = dict.fromkeys(range(len(rows)), 0) if self._exchange.masks else files
        personal = self._evaluator.evaluate(
            rows, tokens, apart, lambda k: self.vector(k, None, values, files), writes
        )
        shared = personal
        if apart:
            shared = self._evaluator.evaluate(rows, tokens, {}, lambda _: values, writes)
        if self._asked is not None:
            for result in (personal, shared):
                self._add_error(result, rows, tokens)
        return {"personal": personal, "global": shared}

    def _add_error(self, result: Evaluation, rows: list[Ids], tokens: Tokens) -> None:
        """To the accuracy of a sample of clients, its standard error."""
        if "accuracy" not in result.scores:
            return
        owner = self._owners(rows, len(tokens))
        correct = result.told == tokens.labels[result.rows]
        clients = len(rows)
        error = metrics.sampling_error(correct, owner[result.rows], clients)
        result.scores["accuracy_error"] = error

    @staticmethod
    def _owners(rows: list[Ids], size: int) -> Ids:
        """(size,) the client of each row."""
        owner = np.zeros(size, dtype=np.int64)
        for k, own in enumerate(rows):
            owner[own] = k
        return owner

    def _test(self, values: torch.Tensor, files: Mapping[int, int]) -> dict[str, Evaluation]:
        rows = self._of_asked([r.test for r in self._setup.rows])
        return self._evaluate(rows, self._setup.test_tokens, values, files, writes=True)

    def _before(self) -> Evaluation:
        """The test split by the model as it was before the first round, of all clients the same."""
        setup = self._setup
        rows = self._of_asked([r.test for r in setup.rows])
        initial = setup.prepared.initial
        return self._evaluator.evaluate(rows, setup.test_tokens, {}, lambda _: initial, writes=True)

    def finish(self, seconds_so_far: Callable[[], float]) -> dict[str, Any]:
        """The test split, used here for the first time, if at all; the adapter; the summary."""
        setup, state = self._setup, self._state
        config, files = setup.config, self._personal.files
        clock = time.monotonic()
        looks = config.evaluation.test
        results = self._test(state.values, files.current) if looks else {}
        before = self._before() if looks and config.evaluation.before else None
        at_best = results
        if state.best is not None and state.best.round + 1 != state.rounds and looks:
            at_best = self._test(state.best.values, files.pinned)
        self._account.evaluated(time.monotonic() - clock)
        summary = {
            "method": config.method,
            "task": config.task.name,
            "seed": config.seed,
            "rounds": state.rounds,
            "metric": setup.task.metric,
            **({"rounded": setup.prepared.rounded} if setup.prepared.rounded else {}),
            **(self._scores(results) if looks else {"test": None}),
            **({"before": before.scores} if before else {}),
            "best": None
            if state.best is None
            else {
                "round": state.best.round + 1,
                "validation": state.best.score,
                **{name: result.scores for name, result in at_best.items()},
            },
            **_left_out(results),
            **({"evaluated_clients": len(self._asked)} if self._asked is not None else {}),
            **self._account.summary(),
            **({"privacy": setup.privacy.summary(state.rounds)} if setup.privacy else {}),
            "seconds": {
                "init": state.seconds.init,
                **state.seconds.phases,
                "total": seconds_so_far(),
            },
            "shared_layers": [block for block in state.chosen if block != HEAD],
        }
        if setup.topology.is_root:
            self._save(results, at_best, before, summary)
        setup.topology.world.comm.Barrier()
        return summary

    def _scores(self, results: dict[str, Evaluation]) -> dict[str, Any]:
        """The summary's part of the test split."""
        final = {name: result.scores for name, result in results.items()}
        return {
            **self._of_classes(final, results),
            "score": {name: result["score"] for name, result in final.items()},
            "test": final,
        }

    def _of_classes(
        self, final: dict[str, dict[str, Any]], results: dict[str, Evaluation]
    ) -> dict[str, Any]:
        """What only classification has: accuracies, their spread over clients, and that of always
        the largest class."""
        if not all("accuracy" in result for result in final.values()):
            return {}
        labels = self._setup.test_tokens.labels
        owner = self._owners([own.test for own in self._setup.rows], len(labels))
        rows = results["global"].rows
        return {
            "accuracy": {name: result["accuracy"] for name, result in final.items()},
            "clients": {
                name: metrics.over_clients(found.told == labels[found.rows], owner[found.rows])
                for name, found in results.items()
            },
            "majority": float(np.bincount(labels[rows]).max() / len(rows)),
        }

    def _save(
        self,
        results: dict[str, Evaluation],
        at_best: dict[str, Evaluation],
        before: Evaluation | None,
        summary: dict[str, Any],
    ) -> None:
        setup, directory = self._setup, self._setup.directory
        prepared = setup.prepared
        directory.save_adapter(
            prepared.adapted, self._state.values, prepared.fresh, setup.task.labels,
            prepared.source, prepared.head.model_class,
        )  # fmt: skip
        if results:
            predictions = {"labels": list(setup.task.labels), **self._told(results)}
            if at_best is not results:
                predictions["best"] = self._told(at_best)
            if before is not None:
                predictions["before"] = self._told({"global": before})
            if results["personal"].written is not None:
                predictions |= self._asked_for(results["personal"].rows)
            directory.save_predictions(predictions)
        directory.save_summary(summary)

    def _asked_for(self, rows: Ids) -> dict[str, list[str]]:
        """For predictions.json: the prompts that were answered, and the right answers."""
        examples = [Example.of(self._setup.task.test.texts[row]) for row in rows]
        return {
            "prompts": [own.messages[-2]["content"] for own in examples],
            "right_answers": [own.answer for own in examples],
        }

    def _told(self, results: dict[str, Evaluation]) -> dict[str, Any]:
        """For predictions.json: the test rows, their labels, and what was predicted."""
        setup, rows = self._setup, next(iter(results.values())).rows
        owner = self._owners([own.test for own in setup.rows], len(setup.test_tokens))
        return {
            "row": rows.tolist(),
            "client": owner[rows].tolist(),
            "label": setup.test_tokens.labels[rows].tolist(),
            **{
                name: [int(v) if v.is_integer() else v for v in result.told.tolist()]
                for name, result in results.items()
            },
            **{
                f"{name}_answers": result.written
                for name, result in results.items()
                if result.written is not None
            },
        }


def _left_out(results: dict[str, Evaluation]) -> dict[str, Any]:
    """For a record: clients with rows that could not be evaluated, and why, if there are some."""
    reasons = {str(k): why for result in results.values() for k, why in result.left_out.items()}
    return {"not_evaluated": reasons} if reasons else {}
