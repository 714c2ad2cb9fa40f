"""One client's part of a round, in its slot: score, order, mask, train."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hpcfed.cluster.collectives import sum_over_ranks
from hpcfed.data.batches import Floats, Ids, form_batches
from hpcfed.engine.client import STEPS, ClientError, Trained
from hpcfed.engine.probe import fisher_traces, row_losses
from hpcfed.policies import curriculum, sampling, sparsity
from hpcfed.rng import derive, generator
from hpcfed.round import Outcome, Round
from hpcfed.rounds.setup import Setup
from hpcfed.state import CURRICULUM, MOMENTS, PERSONAL, RunState
from hpcfed.storage.states import ClientStates


@dataclass
class Lesson:
    """What a client trains on in a round: its batches, the numbers of those in use, easy first,
    and, if their order needs the model, the rows' difficulties (len(tokens),)."""

    batches: list[Ids]
    order: list[int]
    difficulty: Floats | None = None
    scored: int = 0  # sample passes it cost


class LocalRounds:
    """The clients' side of the method."""

    def __init__(self, setup: Setup, states: Mapping[str, ClientStates]) -> None:
        """states: what clients keep, by kind."""
        self._config = setup.config
        self._client = setup.client
        self._rows = setup.rows
        self._tokens = setup.train_tokens
        self._directory = setup.directory
        self._personal = states[PERSONAL]
        self._lessons = states[CURRICULUM]
        self._moments = states[MOMENTS]
        spec = setup.config.curriculum
        self._ordered = spec.pace != "all"
        self._needs = curriculum.NEEDS.get(spec.difficulty) if self._ordered else None

    @property
    def scores_everyone(self) -> bool:
        """Whether all clients are scored when the method begins."""
        return self._needs is not None and self._config.curriculum.when == "start"

    def portion(self, number: int) -> float:
        """f(t) of round `number`, from 0."""
        spec = self._config.curriculum
        return curriculum.share(
            spec.pace, spec.start, spec.full_at, number, self._config.federation.rounds
        )

    def _must_score(self, client: int, now: Round) -> bool:
        """Whether a client's round begins with a pass over its rows; the same on all ranks."""
        own_pass = self._needs is not None and self._config.curriculum.when != "training"
        return own_pass and not now.warm and client not in self._lessons.files.current

    def cost(self, client: int, now: Round) -> int:
        """Tokens that a client will pass through the model in a round, about."""
        tokens = int(self._tokens.lengths[self._rows[client].train].sum())
        passes = self._config.local.epochs * self.portion(now.number)
        return round(tokens * (passes + self._must_score(client, now)))

    def accept(self, now: Round, clients: list[int]) -> None:
        """What these clients saved in this round is current from now on."""
        if now.personal:
            self._personal.accept(now.number, clients)
        if self._needs and not now.warm:
            self._lessons.accept(now.number, clients)
        if self._config.local.moments == "keep":
            self._moments.accept(now.number, clients)

    def run(
        self, client: int, now: Round, vector: torch.Tensor, control: torch.Tensor | None = None
    ) -> Outcome:
        """Train a client from `vector` (layout.size,). Collective over the slot.

        control: (layout.size,), added to the gradient of every step. A failure that the slot's
        ranks agree on is in the outcome; the client keeps what it had.
        """
        config, engine, number = self._config, self._client, now.number
        done = Outcome()
        state = self._personal.load(client) if not now.warm else None
        old = state["fisher"] if state and "fisher" in state else None
        mask = sparsity.trainable(engine.layout, old, config.sparsity.keep, now.personal)
        if mask is not None:
            own = engine.layout.pack(mask, now.personal)
            done.density = float(own.double().mean())
        tracks = not now.warm and config.sparsity.keep < 1 and bool(now.personal)
        try:
            moments = self._moments.load(client)
            engine.load(vector, mask, moments, control)
            clock = time.monotonic()
            lesson = self._lesson(client, now)
            done.scored = lesson.scored
            if lesson.scored:
                done.score_seconds = time.monotonic() - clock
            trained = self._train(client, number, lesson, tracks)
            done.samples, done.steps = trained.samples, trained.steps
            values = engine.read()
            if not bool(torch.isfinite(values).all()):
                raise ClientError("its values are not finite after training")
            if control is not None:
                done.gradient = engine.mean_gradient(trained.steps)
            if config.local.moments == "keep":
                so_far = int(moments[STEPS]) if moments else 0
                moments = engine.moments(so_far + trained.steps)
        except ClientError as failure:
            done.reason = str(failure)
            return done
        done.values, done.loss_sum = values, trained.loss_sum
        if engine.topology.leads_slot:
            if lesson.difficulty is not None:
                self._save_lesson(client, number, lesson.difficulty)
            if now.personal:
                tensors = {"values": engine.layout.pack(values, now.personal)}
                if tracks:
                    gamma = config.sparsity.momentum
                    tensors["fisher"] = sparsity.momentum(old, trained.neurons, gamma)
                self._personal.save(client, number, tensors)
            if moments:
                self._moments.save(client, number, moments)
            if self._ordered or tracks:
                self._note(client, number, lesson, done)
        return done

    def _train(self, client: int, number: int, lesson: Lesson, tracks: bool) -> Trained:
        """The local epochs; brings the lesson's difficulties up to date."""
        config, engine = self._config, self._client
        spec, rank = config.curriculum, engine.topology.rank_in_slot
        known = lesson.difficulty
        learns = known is not None and (spec.refresh or spec.when == "training")
        trained = engine.train(
            self._epochs(client, number, lesson),
            self._tokens,
            derive(config.seed, "dropout", number, client, rank),
            observe=tracks or learns,
        )
        if known is not None and learns:
            fresh = trained.fisher if self._needs == "fisher" else trained.losses
            rows = trained.rows if spec.refresh else trained.rows[np.isinf(known[trained.rows])]
            known[rows] = fresh[rows]
        return trained

    def _note(self, client: int, number: int, lesson: Lesson, done: Outcome) -> None:
        """A line in the client's own history."""
        note: dict[str, Any] = {"round": number + 1, "mask_density": done.density}
        if self._ordered:
            note |= {
                "share": self.portion(number),
                "batches": [batch.tolist() for batch in lesson.batches],
                "trained": lesson.order,
            }
        if lesson.difficulty is not None:
            rows = self._rows[client].train
            found = {int(row): float(lesson.difficulty[row]) for row in rows}
            note["difficulty"] = {k: v if np.isfinite(v) else None for k, v in found.items()}
        self._directory.note(client, note)

    def score_everyone(self, state: RunState) -> int:
        """Take the difficulties of all clients, spread over the slots, before round `state.rounds`;
        returns the sample passes."""
        engine = self._client
        topology = engine.topology
        sizes = {k: len(own.train) for k, own in enumerate(self._rows)}
        passes = np.zeros(len(sizes))
        for k in sampling.spread(sizes, topology.slots)[topology.slot_index]:
            try:
                engine.load(state.values)
                difficulty = self._score(k)
            except ClientError:
                if engine.interrupted:
                    break
                continue  # it is scored, or fails again, in its first round
            if topology.leads_slot:
                self._save_lesson(k, state.rounds, difficulty)
                passes[k] = sizes[k]
        sum_over_ranks(passes, topology)
        engine.leave_if_interrupted()
        self._lessons.accept(state.rounds, [int(k) for k in np.flatnonzero(passes)])
        return int(passes.sum())

    def _formed(self, client: int) -> list[Ids]:
        """A client's batches, formed once."""
        return form_batches(
            self._rows[client].train,
            self._tokens.lengths,
            self._config.local.batch_size,
            generator(self._config.seed, "batches", client),
        )

    def _lesson(self, client: int, now: Round) -> Lesson:
        """What a client trains on in this round, at the values in the engine."""
        if not self._ordered:
            return Lesson([], [])
        spec, seed, number = self._config.curriculum, self._config.seed, now.number
        batches = self._formed(client)
        rows = self._rows[client].train
        difficulty = None
        scored = 0
        if now.warm:
            order = curriculum.order(None, len(batches), generator(seed, "warmup", number, client))
        elif self._needs is None:
            if spec.difficulty != "random":
                difficulty = np.zeros(len(self._tokens))
                difficulty[rows] = curriculum.text_difficulty(spec.difficulty, rows, self._tokens)
            order = self._order(client, batches, difficulty)
            difficulty = None  # nothing to keep
        else:
            known = self._lessons.load(client)
            if known is not None:
                difficulty = np.zeros(len(self._tokens))
                difficulty[rows] = known["difficulty"].numpy()
            elif spec.when == "training":
                difficulty = np.full(len(self._tokens), curriculum.UNKNOWN)
            else:
                difficulty = self._score(client)
                scored = len(rows)
            order = self._order(client, batches, difficulty)
        used = curriculum.in_use(order, self.portion(number))
        return Lesson(batches, used, difficulty, scored)

    def _order(self, client: int, batches: list[Ids], difficulty: Floats | None) -> list[int]:
        """Batch numbers, easy first; without difficulties a random order, each client's own."""
        rng = generator(self._config.seed, "order", client)
        if difficulty is None or np.isinf(difficulty[self._rows[client].train]).all():
            return curriculum.order(None, len(batches), rng)
        kind = self._config.curriculum.difficulty
        hard = curriculum.batch_difficulty(kind, batches, difficulty)
        return curriculum.order(hard, len(batches), rng)

    def _score(self, client: int) -> Floats:
        """(len(tokens),) difficulties of a client's rows at the values in the engine."""
        batches = self._formed(client)
        take = fisher_traces if self._needs == "fisher" else row_losses
        return take(self._client, batches, self._tokens)

    def _save_lesson(self, client: int, number: int, difficulty: Floats) -> None:
        own = torch.from_numpy(difficulty[self._rows[client].train])
        self._lessons.save(client, number, {"difficulty": own})

    def epochs(self, client: int, number: int) -> list[Ids]:
        """All batches of a client's local epochs in a round without a curriculum: in each epoch
        all rows, meeting in new batches."""
        return self._epochs(client, number, Lesson([], []))

    def _epochs(self, client: int, number: int, lesson: Lesson) -> list[Ids]:
        """Batches of the local epochs; with a curriculum those in use, shuffled in each."""
        config = self._config
        batches: list[Ids] = []
        for epoch in range(config.local.epochs):
            rng = generator(config.seed, "batches", number, client, epoch)
            if self._ordered:
                order = lesson.order
                batches += [lesson.batches[order[i]] for i in rng.permutation(len(order))]
            else:
                rows, lengths = self._rows[client].train, self._tokens.lengths
                batches += form_batches(rows, lengths, config.local.batch_size, rng)
        return batches
