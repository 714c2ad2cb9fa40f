"""One client's part of a round, in its slot: score, order, mask, train."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hpcfed.data.batches import Floats, Ids, Tokens, form_batches
from hpcfed.data.partition import ClientRows
from hpcfed.engine.client import STEPS, Client, ClientError, Trained
from hpcfed.engine.probe import fisher_traces, row_losses
from hpcfed.policies import curriculum, sparsity
from hpcfed.rng import derive, generator
from hpcfed.settings.config import Config
from hpcfed.storage.run import RunDirectory
from hpcfed.storage.states import ClientStates


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
    gradient: torch.Tensor | None = None  # (layout.size,) mean over its steps, for SCAFFOLD
    score_seconds: float = 0.0  # of the pass that took them


@dataclass
class Lesson:
    """What a client trains on in a round: its batches, the numbers of those in use, easy first,
    and, if their order needs the model, the rows' difficulties (len(tokens),)."""

    batches: list[Ids]
    order: list[int]
    difficulty: Floats | None = None
    scored: int = 0  # sample passes it cost


class LocalRounds:
    """The clients' side of the method. What they keep: `personal` holds the values of layers that
    stay home and the Fisher momentum, `lessons` the difficulties, `moments` the optimizer's."""

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
        self.moments = ClientStates("moments", directory, writes)
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
        own_pass = self.needs is not None and self._config.curriculum.when != "training"
        return own_pass and not warm and client not in self.lessons.current

    def cost(self, client: int, number: int) -> int:
        """Tokens that a client will pass through the model in a round, about."""
        tokens = int(self._tokens.lengths[self._rows[client].train].sum())
        share = self._config.local.epochs * self.share(number)
        return round(tokens * (share + self.must_score(client, number)))

    def keep(self, number: int, clients: list[int], personal: bool) -> None:
        """What these clients saved in this round is current from now on."""
        if personal:
            self.personal.keep(number, clients)
        if self.needs and number >= self._config.curriculum.warmup:
            self.lessons.keep(number, clients)
        if self._config.local.moments == "keep":
            self.moments.keep(number, clients)

    def run(
        self,
        client: int,
        number: int,
        vector: torch.Tensor,
        personal_blocks: tuple[str, ...],
        control: torch.Tensor | None = None,
    ) -> Outcome:
        """Train a client from `vector` (layout.size,). Collective over the slot.

        control: (layout.size,), added to the gradient of every step. A failure that the slot's
        ranks agree on is in the outcome; the client keeps what it had.
        """
        config, engine = self._config, self._client
        warm = number < config.curriculum.warmup
        done = Outcome()
        state = self.personal.load(client) if not warm else None
        old = state["fisher"] if state and "fisher" in state else None
        mask = sparsity.trainable(engine.layout, old, config.sparsity.keep, personal_blocks)
        if mask is not None:
            own = engine.layout.pack(mask, personal_blocks)
            done.density = float(own.double().mean())
        tracks = not warm and config.sparsity.keep < 1 and bool(personal_blocks)
        try:
            moments = self.moments.load(client)
            engine.load(vector, mask, moments, control)
            clock = time.monotonic()
            lesson = self._lesson(client, number)
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
            if personal_blocks:
                tensors = {"values": engine.layout.pack(values, personal_blocks)}
                if tracks:
                    gamma = config.sparsity.momentum
                    tensors["fisher"] = sparsity.momentum(old, trained.neurons, gamma)
                self.personal.save(client, number, tensors)
            if moments:
                self.moments.save(client, number, moments)
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
            fresh = trained.fisher if self.needs == "fisher" else trained.losses
            rows = trained.rows if spec.refresh else trained.rows[np.isinf(known[trained.rows])]
            known[rows] = fresh[rows]
        return trained

    def _note(self, client: int, number: int, lesson: Lesson, done: Outcome) -> None:
        """A line in the client's own history."""
        note: dict[str, Any] = {"round": number + 1, "mask_density": done.density}
        if self._ordered:
            note |= {
                "share": self.share(number),
                "batches": [batch.tolist() for batch in lesson.batches],
                "trained": lesson.order,
            }
        if lesson.difficulty is not None:
            rows = self._rows[client].train
            found = {int(row): float(lesson.difficulty[row]) for row in rows}
            note["difficulty"] = {k: v if np.isfinite(v) else None for k, v in found.items()}
        self._directory.note(client, note)

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

    def _lesson(self, client: int, number: int) -> Lesson:
        """What a client trains on in this round, at the values in the engine."""
        if not self._ordered:
            return Lesson([], [])
        spec, seed = self._config.curriculum, self._config.seed
        batches = self._formed(client)
        rows = self._rows[client].train
        difficulty = None
        scored = 0
        if number < spec.warmup:
            order = curriculum.order(None, len(batches), generator(seed, "warmup", number, client))
        elif self.needs is None:
            if spec.difficulty != "random":
                difficulty = np.zeros(len(self._tokens))
                difficulty[rows] = curriculum.text_difficulty(spec.difficulty, rows, self._tokens)
            order = self._order(client, batches, difficulty)
            difficulty = None  # nothing to keep
        else:
            known = self.lessons.load(client)
            if known is not None:
                difficulty = np.zeros(len(self._tokens))
                difficulty[rows] = known["difficulty"].numpy()
            elif spec.when == "training":
                difficulty = np.full(len(self._tokens), curriculum.UNKNOWN)
            else:
                difficulty = self._score(client)
                scored = len(rows)
            order = self._order(client, batches, difficulty)
        used = curriculum.in_use(order, self.share(number))
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
        take = fisher_traces if self.needs == "fisher" else row_losses
        return take(self._client, batches, self._tokens)

    def _save_lesson(self, client: int, number: int, difficulty: Floats) -> None:
        own = torch.from_numpy(difficulty[self._rows[client].train])
        self.lessons.save(client, number, {"difficulty": own})

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
