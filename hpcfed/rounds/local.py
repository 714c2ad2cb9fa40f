"""One client's part of a round, in its slot: score, order, mask, train."""

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hpcfed import registry
from hpcfed.cluster.collectives import sum_over_ranks
from hpcfed.data.batches import Floats, Ids, form_batches
from hpcfed.engine import dpsgd
from hpcfed.engine.failures import ClientError
from hpcfed.engine.masters import STEPS
from hpcfed.engine.probe import fisher_traces, row_losses
from hpcfed.engine.trained import Trained
from hpcfed.policies import curriculum, rates, sampling, sparsity
from hpcfed.rng import derive, generator
from hpcfed.round import Outcome, Round
from hpcfed.rounds.setup import Setup
from hpcfed.state import CURRICULUM, MOMENTS, PERSONAL, RunState
from hpcfed.storage.states import ClientStates


@dataclass
class Schedule:
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
        self._engine = setup.engine
        self._extra = setup.prepared.adapted.extra
        self._senses = registry.AGGREGATIONS[setup.config.aggregation.rule].senses
        self._rows = setup.rows
        self._cuts = setup.cuts
        self._tokens = setup.train_tokens
        self._directory = setup.directory
        self._ledger = setup.ledger
        self._personal = states[PERSONAL]
        self._difficulties = states[CURRICULUM]
        self._moments = states[MOMENTS]
        spec = setup.config.curriculum
        self._ordered = spec.pace != "all"
        difficulty = registry.DIFFICULTIES[spec.difficulty]
        measured = isinstance(difficulty, curriculum.Measured)
        self._needs = difficulty.reads if measured and self._ordered else None
        self._of_texts: curriculum.OfTexts | None = None if measured else difficulty
        self._hardest_first = measured and difficulty.hardest_first

    @property
    def scores_everyone(self) -> bool:
        """Whether all clients are scored when the method begins."""
        return self._needs is not None and self._config.curriculum.when == "start"

    def portion(self, round_number: int) -> float:
        """f(t) of round `round_number`, from 0."""
        spec = self._config.curriculum
        return curriculum.portion(
            spec.pace, spec.start, spec.full_at, round_number, self._config.federation.rounds
        )

    def rate(self, round_number: int) -> float:
        """The learning rate of round `round_number`, from 0."""
        spec, rounds = self._config.local, self._config.federation.rounds
        return rates.rate(spec.lr_schedule, spec.lr, spec.lr_end, round_number, rounds)

    def _must_score(self, client: int, now: Round) -> bool:
        """Whether a client's round begins with a pass over its rows; the same on all ranks."""
        own_pass = self._needs is not None and self._config.curriculum.when != "training"
        return own_pass and not now.warm and client not in self._difficulties.files.current

    def cost(self, client: int, now: Round) -> int:
        """Tokens that a client will pass through the model in a round, about."""
        tokens = int(self._cuts.at(now.number).lengths[self._rows[client].train].sum())
        local, rows = self._config.local, len(self._rows[client].train)
        passes = local.epochs * self.portion(now.number)
        if local.max_steps is not None:
            passes = min(passes, local.max_steps * local.batch_size / rows)
        return round(tokens * (passes + self._must_score(client, now)))

    def accept(self, now: Round, clients: list[int]) -> None:
        """What these clients saved in this round is current from now on."""
        if now.personal:
            self._personal.accept(now.number, clients)
        if self._needs and not now.warm:
            self._difficulties.accept(now.number, clients)
        if self._config.local.moments == "keep":
            self._moments.accept(now.number, clients)

    def run(
        self,
        client: int,
        now: Round,
        vector: torch.Tensor,
        control: torch.Tensor | None = None,
        has: torch.Tensor | None = None,
    ) -> Outcome:
        """Train a client from `vector` (layout.size,). Collective over the slot.

        control: (layout.size,), added to the gradient of every step. has: (layout.size,) bool, the
        values that this client has, None: all. A failure that the slot's ranks agree on is in the
        outcome; the client keeps what it had.
        """
        config, engine, round_number = self._config, self._engine, now.number
        done = Outcome()
        engine.topology.world.watch.doing(f"training client {client} in round {round_number + 1}")
        engine.rehearsal.enter("train", round_number + 1, client)
        state = self._personal.load(client) if not now.warm else None
        old = state["fisher"] if state and "fisher" in state else None
        trainable = sparsity.trainable(engine.layout, old, config.sparsity.keep, now.personal)
        if trainable is not None:
            packed = now.personal.pack(trainable)
            done.density = float(packed.double().mean())
        first, *later = self._masks(now, trainable, has)
        tracks = not now.warm and config.sparsity.keep < 1 and bool(now.personal)
        try:
            moments = self._moments.load(client)
            senses = self._senses and not now.warm
            engine.load(vector, first, moments, control, self.rate(round_number), senses)
            clock = time.monotonic()
            schedule = self._schedule(client, now)
            done.scored = schedule.scored * (1 + self._extra)
            if schedule.scored:
                done.score_seconds = time.monotonic() - clock
            trained = self._train(client, round_number, schedule, tracks, first, later)
            done.samples, done.steps = trained.samples, trained.steps
            done.tokens = trained.tokens
            done.scored += trained.samples * self._extra
            values = engine.read()
            if not bool(torch.isfinite(values).all()):
                raise ClientError("its values are not finite after training")
            if senses:
                done.importance = engine.importance(trained.steps)
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
            if schedule.difficulty is not None:
                self._save_difficulty(client, round_number, schedule.difficulty)
            if now.personal:
                tensors = {"values": now.personal.pack(values)}
                if tracks:
                    gamma = config.sparsity.momentum
                    tensors["fisher"] = sparsity.momentum(old, trained.neurons, gamma)
                self._personal.save(client, round_number, tensors)
            if moments:
                self._moments.save(client, round_number, moments)
            if self._ordered or tracks:
                self._note(client, round_number, schedule, done)
        return done

    def _masks(
        self, now: Round, trainable: torch.Tensor | None, has: torch.Tensor | None
    ) -> list[torch.Tensor | None]:
        """What trains in each phase of the round, one after the other: (layout.size,) bool, None:
        everything."""
        split = now.split
        limits = [own for own in (trainable, has) if own is not None]
        still = split.frozen - self._engine.layout.residual
        if still:
            limits.append(~still.mask())
        phases = [[*limits, phase.mask()] for phase in split.phases if phase] or [limits]
        return [torch.stack(each).all(0) if each else None for each in phases]

    def _train(
        self,
        client: int,
        round_number: int,
        schedule: Schedule,
        tracks: bool,
        mask: torch.Tensor | None,
        later: Sequence[torch.Tensor | None] = (),
    ) -> Trained:
        """The local epochs; brings the schedule's difficulties up to date. mask: what trains
        in the phase that is loaded; later: in those after it."""
        config, engine = self._config, self._engine
        spec, rank = config.curriculum, engine.topology.rank_in_slot
        tokens = self._cuts.at(round_number)
        known = schedule.difficulty
        learns = known is not None and (spec.refresh or spec.when == "training")
        batches = self._epochs(client, round_number, schedule)
        seed = derive(config.seed, "dropout", round_number, client, rank)
        cuts = [len(batches) * phase // (1 + len(later)) for phase in range(2 + len(later))]
        first, *others = (batches[start:stop] for start, stop in itertools.pairwise(cuts))
        if self._ledger is not None:
            release = self._ledger.release(client, round_number, self._rows[client].train)
            return dpsgd.train(engine, first, tokens, seed, release, mask)
        trained = engine.train(first, tokens, seed, observe=tracks or learns)
        for phase, (own, part) in enumerate(zip(later, others, strict=True), 1):
            engine.load(engine.read(), own, rate=self.rate(round_number))
            more = engine.train(part, tokens, seed + phase, observe=tracks or learns)
            trained = trained.followed_by(more)
        if known is not None and learns:
            fresh = trained.fisher if self._needs == "fisher" else trained.losses
            rows = trained.rows if spec.refresh else trained.rows[np.isinf(known[trained.rows])]
            known[rows] = fresh[rows]
        return trained

    def _note(self, client: int, round_number: int, schedule: Schedule, done: Outcome) -> None:
        """A line in the client's own history."""
        note: dict[str, Any] = {"round": round_number + 1, "mask_density": done.density}
        if self._ordered:
            note |= {
                "share": self.portion(round_number),
                "batches": [batch.tolist() for batch in schedule.batches],
                "trained": schedule.order,
            }
        if schedule.difficulty is not None:
            rows = self._rows[client].train
            by_row = {int(row): float(schedule.difficulty[row]) for row in rows}
            note["difficulty"] = {k: v if np.isfinite(v) else None for k, v in by_row.items()}
        self._directory.clients.note(client, note)

    def score_everyone(self, state: RunState) -> int:
        """Take the difficulties of all clients, spread over the slots, before round `state.rounds`;
        returns the sample passes."""
        engine = self._engine
        topology = engine.topology
        sizes = {k: len(rows.train) for k, rows in enumerate(self._rows)}
        passes = np.zeros(len(sizes))
        for k in sampling.spread(sizes, topology.slots)[topology.slot_index]:
            topology.world.watch.doing(f"scoring client {k} before round {state.rounds + 1}")
            try:
                engine.rehearsal.enter("score", state.rounds + 1, k)
                engine.load(state.values)
                difficulty = self._score(k, state.rounds)
            except ClientError:
                if engine.interrupted:
                    break
                continue  # it is scored, or fails again, in its first round
            if topology.leads_slot:
                self._save_difficulty(k, state.rounds, difficulty)
                passes[k] = sizes[k] * (1 + self._extra)
        sum_over_ranks(passes, topology)
        engine.leave_if_interrupted()
        self._difficulties.accept(state.rounds, [int(k) for k in np.flatnonzero(passes)])
        return int(passes.sum())

    def _formed(self, client: int) -> list[Ids]:
        """A client's batches, formed once."""
        return form_batches(
            self._rows[client].train,
            self._tokens.lengths,
            self._config.local.batch_size,
            generator(self._config.seed, "batches", client),
        )

    def _schedule(self, client: int, now: Round) -> Schedule:
        """What a client trains on in this round, at the values in the engine."""
        if not self._ordered:
            return Schedule([], [])
        spec, seed, round_number = self._config.curriculum, self._config.seed, now.number
        batches = self._formed(client)
        rows = self._rows[client].train
        difficulty = None
        scored = 0
        if now.warm:
            order = curriculum.order(
                None, len(batches), generator(seed, "warmup", round_number, client)
            )
        elif self._needs is None:
            if self._of_texts is not None:
                difficulty = np.zeros(len(self._tokens))
                difficulty[rows] = self._of_texts(rows, self._tokens)
            order = self._order(client, batches, difficulty)
            difficulty = None  # nothing to keep
        else:
            known = self._difficulties.load(client)
            if known is not None:
                difficulty = np.zeros(len(self._tokens))
                difficulty[rows] = known["difficulty"].numpy()
            elif spec.when == "training":
                difficulty = np.full(len(self._tokens), curriculum.UNKNOWN)
            else:
                difficulty = self._score(client, round_number)
                scored = len(rows)
            order = self._order(client, batches, difficulty)
        used = curriculum.in_use(order, self.portion(round_number))
        return Schedule(batches, used, difficulty, scored)

    def _order(self, client: int, batches: list[Ids], difficulty: Floats | None) -> list[int]:
        """Batch numbers, easy first; without difficulties a random order, each client's own."""
        rng = generator(self._config.seed, "order", client)
        if difficulty is None or np.isinf(difficulty[self._rows[client].train]).all():
            return curriculum.order(None, len(batches), rng)
        hard = curriculum.batch_difficulty(batches, difficulty, self._hardest_first)
        return curriculum.order(hard, len(batches), rng)

    def _score(self, client: int, round_number: int) -> Floats:
        """(len(tokens),) difficulties of a client's rows at the values in the engine."""
        batches = self._formed(client)
        take = fisher_traces if self._needs == "fisher" else row_losses
        return take(self._engine, batches, self._cuts.at(round_number))

    def _save_difficulty(self, client: int, round_number: int, difficulty: Floats) -> None:
        values = torch.from_numpy(difficulty[self._rows[client].train])
        self._difficulties.save(client, round_number, {"difficulty": values})

    def epochs(self, client: int, round_number: int) -> list[Ids]:
        """All batches of a client's local epochs in a round without a curriculum: in each epoch
        all rows, meeting in new batches."""
        return self._epochs(client, round_number, Schedule([], []))

    def _epochs(self, client: int, round_number: int, schedule: Schedule) -> list[Ids]:
        """Batches of the local epochs; with a curriculum those in use, shuffled in each."""
        config = self._config
        if self._ledger is not None:
            return self._ledger.batches(client, round_number, self._rows[client].train)
        if config.federation.pooled:
            return self._pooled(round_number)
        batches: list[Ids] = []
        for epoch in range(config.local.epochs):
            rng = generator(config.seed, "batches", round_number, client, epoch)
            if self._ordered:
                order = schedule.order
                batches += [schedule.batches[order[i]] for i in rng.permutation(len(order))]
            else:
                rows, lengths = self._rows[client].train, self._tokens.lengths
                batches += form_batches(rows, lengths, config.local.batch_size, rng)
        return batches[: config.local.max_steps]

    def _pooled(self, round_number: int) -> list[Ids]:
        """Batches of a round of the one client that has all rows: on from where the last round
        ended, as many rows as the clients of a round have on average, times the local epochs."""
        config, rows = self._config, self._rows[0].train
        spec, local = config.federation, config.local
        assert spec.clients is not None
        size = max(1, round(local.epochs * len(rows) * spec.per_round / spec.clients))
        start = round_number * size
        batches: list[Ids] = []
        for turn, part in enumerate(sampling.stream(config.seed, rows, start, start + size)):
            rng = generator(config.seed, "batches", round_number, 0, turn)
            batches += form_batches(part, self._tokens.lengths, local.batch_size, rng)
        return batches[: local.max_steps]
