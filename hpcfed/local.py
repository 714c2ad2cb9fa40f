"""One client's part of a round, in its slot: score, order, mask, train."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hpcfed.client import Client, ClientError, Floats
from hpcfed.collectives import sum_in_slot
from hpcfed.config import Config
from hpcfed.data.batches import Ids, Tokens, form_batches
from hpcfed.data.partition import ClientRows
from hpcfed.policies import curriculum, sparsity
from hpcfed.probe import fisher_traces
from hpcfed.rng import derive, generator
from hpcfed.run import RunDirectory
from hpcfed.states import ClientStates


@dataclass
class Outcome:
    """What one client did in one round; `values` (layout.size,) is None if it failed."""

    values: torch.Tensor | None = None
    reason: str = ""  # why it failed
    loss_sum: float = 0.0  # this rank's share of it
    samples: int = 0  # trained on
    steps: int = 0
    scored: int = 0  # sample passes spent on difficulties before training
    density: float = 1.0  # share of its personal values that trained
    seconds: dict[str, float] = field(default_factory=lambda: {"score": 0.0, "train": 0.0})


class LocalRounds:
    """The clients' side of the method. What they keep: `personal` holds the values of layers that
    stay home and the Fisher momentum, `lessons` the difficulties."""

    def __init__(
        self,
        config: Config,
        client: Client,
        rows: list[ClientRows],
        tokens: Tokens,
        directory: RunDirectory,
    ) -> None:
        self._config = config
        self._client = client
        self._rows = rows
        self._tokens = tokens
        self._directory = directory
        writes = client.topology.is_root
        self.personal = ClientStates("personal", directory, writes)
        self.lessons = ClientStates("curriculum", directory, writes)
        spec = config.curriculum
        self._ordered = spec.pace != "all"
        self.needs = curriculum.NEEDS.get(spec.difficulty) if self._ordered else None

    def share(self, number: int) -> float:
        """f(t) of round `number`, from 0."""
        spec = self._config.curriculum
        return curriculum.share(
            spec.pace, spec.start, spec.full_at, number, self._config.federation.rounds
        )

    def must_score(self, client: int, number: int) -> bool:
        """Whether a client's round begins with a pass over its rows; the same on all ranks."""
        warm = number < self._config.curriculum.warmup
        return self.needs is not None and not warm and client not in self.lessons.current

    def cost(self, client: int, number: int) -> int:
        """Tokens that a client will pass through the model in a round, about."""
        tokens = int(self._tokens.lengths[self._rows[client].train].sum())
        share = self._config.local.epochs * self.share(number)
        return round(tokens * (share + self.must_score(client, number)))

    def run(
        self, client: int, number: int, vector: torch.Tensor, personal_blocks: tuple[str, ...]
    ) -> Outcome:
        """Train a client from `vector` (layout.size,). Collective over the slot.

        A failure that the slot's ranks agree on is in the outcome; the client keeps what it had.
        """
        config, engine = self._config, self._client
        warm = number < config.curriculum.warmup
        done = Outcome()
        clock = time.monotonic()
        state = self.personal.load(client) if not warm else None
        old = state["fisher"] if state and "fisher" in state else None
        mask = sparsity.trainable(engine.layout, old, config.sparsity.keep, personal_blocks)
        if mask is not None:
            own = engine.layout.pack(mask, personal_blocks)
            done.density = float(own.double().mean())
        try:
            engine.load(vector, mask)
            batches, order, difficulty = self._lesson(client, number, done)
            done.seconds["score"] = time.monotonic() - clock
            clock = time.monotonic()
            tracks = not warm and config.sparsity.keep < 1 and bool(personal_blocks)
            refreshes = difficulty is not None and config.curriculum.refresh
            trained = engine.train(
                self.epochs(client, number, batches, order),
                self._tokens,
                derive(config.seed, "dropout", number, client, engine.topology.rank_in_slot),
                observe=tracks or refreshes,
            )
            done.samples, done.steps = trained.samples, trained.steps
            values = engine.read()
            if not bool(torch.isfinite(values).all()):
                raise ClientError("its values are not finite after training")
        except ClientError as failure:
            done.reason = str(failure)
            done.seconds["train"] = time.monotonic() - clock
            return done
        done.values, done.loss_sum = values, trained.loss_sum
        rows = self._rows[client].train
        if difficulty is not None and refreshes:
            fresh = trained.fisher if self.needs == "fisher" else trained.losses
            met = np.unique(np.concatenate([batches[i] for i in order]))
            difficulty[met] = fresh[met]
        if engine.topology.leads_slot:
            if difficulty is not None:
                self._save_lesson(client, number, difficulty)
            if personal_blocks:
                tensors = {"values": engine.layout.pack(values, personal_blocks)}
                if tracks:
                    gamma = config.sparsity.momentum
                    tensors["fisher"] = sparsity.momentum(old, trained.neurons, gamma)
                self.personal.save(client, number, tensors)
            if self._ordered or tracks:
                note: dict[str, Any] = {"round": number + 1, "mask_density": done.density}
                if self._ordered:
                    note |= {
                        "share": self.share(number),
                        "batches": [batch.tolist() for batch in batches],
                        "trained": order,
                    }
                if difficulty is not None:
                    note["difficulty"] = {int(row): float(difficulty[row]) for row in rows}
                self._directory.note(client, note)
        done.seconds["train"] = time.monotonic() - clock
        return done

    def score(self, client: int, number: int, vector: torch.Tensor) -> int:
        """Take a client's difficulties without training it; returns the sample passes.

        Raises ClientError on all ranks of the slot.
        """
        self._client.load(vector)
        difficulty = self._score(client)
        if self._client.topology.leads_slot:
            self._save_lesson(client, number, difficulty)
        return len(self._rows[client].train)

    def _formed(self, client: int) -> list[Ids]:
        """A client's batches, formed once."""
        return form_batches(
            self._rows[client].train,
            self._tokens.lengths,
            self._config.local.batch_size,
            generator(self._config.seed, "batches", client),
        )

    def _lesson(
        self, client: int, number: int, done: Outcome
    ) -> tuple[list[Ids], list[int], Floats | None]:
        """A client's batches, the numbers of those in use, and its difficulties by row if the
        order needs the model's."""
        if not self._ordered:
            return [], [], None
        spec, seed = self._config.curriculum, self._config.seed
        batches = self._formed(client)
        rows = self._rows[client].train
        difficulty = None
        if number < spec.warmup:
            order = curriculum.order(None, len(batches), generator(seed, "warmup", number, client))
        elif spec.difficulty == "random":
            order = curriculum.order(None, len(batches), generator(seed, "order", client))
        elif self.needs is None:
            scores = np.zeros(len(self._tokens))
            scores[rows] = curriculum.text_difficulty(spec.difficulty, rows, self._tokens)
            hard = curriculum.batch_difficulty(spec.difficulty, batches, scores)
            order = curriculum.order(hard, len(batches), generator(seed, "order", client))
        else:
            known = self.lessons.load(client)
            if known is None:
                difficulty = self._score(client)
                done.scored = len(rows)
            else:
                difficulty = np.zeros(len(self._tokens))
                difficulty[rows] = known["difficulty"].numpy()
            hard = curriculum.batch_difficulty(spec.difficulty, batches, difficulty)
            order = curriculum.order(hard, len(batches), generator(seed, "order", client))
        return batches, curriculum.in_use(order, self.share(number)), difficulty

    def _score(self, client: int) -> Floats:
        """(len(tokens),) difficulties of a client's rows at the values in the engine."""
        batches = self._formed(client)
        if self.needs == "fisher":
            return fisher_traces(self._client, batches, self._tokens)
        losses = self._client.predict(batches, self._tokens)[1]
        return sum_in_slot(losses, self._client.topology)

    def _save_lesson(self, client: int, number: int, difficulty: Floats) -> None:
        own = torch.from_numpy(difficulty[self._rows[client].train])
        self.lessons.save(client, number, {"difficulty": own})

    def epochs(
        self, client: int, number: int, batches: Sequence[Ids] = (), order: Sequence[int] = ()
    ) -> list[Ids]:
        """Batches of a client's local epochs. With a curriculum, those in use, shuffled in each
        epoch; else all rows, meeting in new batches in each."""
        config = self._config
        epochs = []
        for epoch in range(config.local.epochs):
            rng = generator(config.seed, "batches", number, client, epoch)
            if self._ordered:
                epochs += [batches[order[i]] for i in rng.permutation(len(order))]
            else:
                epochs += form_batches(
                    self._rows[client].train, self._tokens.lengths, config.local.batch_size, rng
                )
        return epochs
