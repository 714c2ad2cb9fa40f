"""The round loop: the program's story.

state of client k + shared values -> slot's engine -> batches -> local steps -> new values
  -> packed, only the shared part, times n_k, added up over the slot's clients (exchange.py)
  -> one exchange between slots -> server step (the same on every rank) -> commit -> next round
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hpcfed import registry
from hpcfed.adapters.layout import HEAD
from hpcfed.cluster.collectives import MaskedSum, sum_in_slot
from hpcfed.engine.failures import StopError
from hpcfed.policies import sampling
from hpcfed.policies.sharing import Sharing
from hpcfed.round import Outcome, Round
from hpcfed.rounds import tracker as tracking
from hpcfed.rounds.account import Account, Traffic, too_few
from hpcfed.rounds.exchange import Exchange
from hpcfed.rounds.local import LocalRounds
from hpcfed.rounds.progress import Progress
from hpcfed.rounds.results import Results
from hpcfed.rounds.selection import select
from hpcfed.rounds.setup import Setup
from hpcfed.rounds.tally import Tally
from hpcfed.rounds.tracker import Tracker
from hpcfed.state import KINDS, PERSONAL
from hpcfed.storage.paths import tensors_of
from hpcfed.storage.states import ClientStates

# A round is drawn again so many times before the run ends.
REDRAWS = 3


class Federation:
    """All rounds of one run, on all ranks."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.state = setup.state
        self.layout = setup.prepared.adapted.layout
        self._config, self._topology = setup.config, setup.topology
        self._guard = setup.guard
        # With privacy a round counts whoever comes through: to draw again would tell who does.
        self._needed = setup.config.federation.min_clients if setup.privacy is None else 0
        self.client_states = {
            kind: ClientStates(
                kind, self.state.clients[kind], setup.directory, setup.topology.is_root
            )
            for kind in KINDS
        }
        rule = registry.SHARING[setup.config.sharing.rule]
        self.sharing = Sharing(rule, self.layout)
        self.local = LocalRounds(setup, self.client_states)
        self.exchange = Exchange(setup, self.client_states)
        self.account = Account(self.layout, self.state)
        self.results = Results(
            setup, self.client_states[PERSONAL], self.account, self.sharing, self.exchange
        )

    def run(self, progress: Progress) -> dict[str, Any] | None:
        """Run all rounds that are left, save the shared adapter, and return summary.json's content;
        None if a signal asked to stop before: then the run can be resumed."""
        with self._topology.world.watch.strictly():
            return self._run(progress)

    def _run(self, progress: Progress) -> dict[str, Any] | None:
        config, state = self._config, self.state
        tracker = Tracker()
        with self._topology.world.agreement("beginning the tracker"):
            if self._topology.is_root:
                directory = self.setup.directory
                tracker = tracking.begin(config, directory.path, directory.clients.run)
        progress.start(self.setup.opening())
        stopping = False
        while not stopping and state.rounds < self.setup.rounds:
            if state.rounds == config.curriculum.warmup:
                try:
                    self.begin_method(progress)
                except StopError:
                    break
            record, stopping = self.round(progress)
            if record is None:
                break
            self.setup.stop.trained()
            self._enter("evaluate", f"validating round {state.rounds}", state.rounds)
            self.results.validate(record)
            self.commit(record)
            tracker.round(record)
            progress.round(record)
            self.setup.stop.committed()
        done = not stopping and state.rounds >= self.setup.rounds
        summary = self.results.finish(lambda: self.seconds_so_far) if done else None
        tracker.finish(summary)
        if summary is not None:
            progress.finish(summary)
        else:
            progress.interrupted(state.rounds)
        self.setup.directory.close()
        self.setup.engine.close()
        return summary

    def begin_method(self, progress: Progress) -> None:
        """After the warm-up: choose the shared layers; score the clients, if all are scored now."""
        config, state, setup = self._config, self.state, self.setup
        clock = time.monotonic()
        self._enter("select", "choosing the shared layers")
        selection = select(
            config, setup.engine, setup.rows, setup.train_tokens, setup.prepared.initial, state
        )  # fmt: skip
        state.chosen = tuple(b for b in self.layout.blocks if b in (*selection.chosen, HEAD))
        self.account.before_the_round(selection.samples, select=time.monotonic() - clock)
        clock = time.monotonic()
        passes = self.local.score_everyone(state) if self.local.scores_everyone else 0
        self.account.before_the_round(passes, score=time.monotonic() - clock)
        if self._topology.is_root and config.layers.score != "all":
            setup.directory.save_selection({"round": state.rounds + 1, **selection.record})
        progress.chose(state.rounds, selection.record)

    def round(self, progress: Progress) -> tuple[dict[str, Any] | None, bool]:
        """The next round: sample, train, exchange, server step. Returns its metrics, None if it was
        dropped because the job has to stop, and whether the job has to stop.

        A draw of which fewer than federation.min_clients come through is dropped, and others are
        drawn. Raises RunError, on all ranks, after REDRAWS of them.
        """
        earlier: list[tuple[int, ...]] = []
        while True:
            now = self.next_round(earlier)
            record, stopping = self._draw(now, progress)
            if record is None or len(record["failed"]) <= len(now.clients) - self._needed:
                return record, stopping
            progress.redraws(record, self._needed)
            self.account.redrawn(record)
            earlier.append(now.clients)
            if stopping:
                return None, True
            if len(earlier) > REDRAWS:
                raise too_few(record, len(earlier), self._needed)

    def _draw(self, now: Round, progress: Progress) -> tuple[dict[str, Any] | None, bool]:
        """A round with these clients; the server's step is made if enough come through."""
        clock = time.monotonic()
        costs = {k: self.local.cost(k, now) for k in now.clients}
        lane = sampling.spread(costs, self._topology.slots)[self._topology.slot_index]
        # Before the exchange: after it the first rank may replace the files that say so.
        sizes = {k: self.exchange.sizes(k, now) for k in now.clients}
        seconds = {"select": time.monotonic() - clock}
        sums, tally = self._train(now, lane, progress)
        mean, tally, wire, seconds["exchange"] = self._exchange(now, sums, tally)
        if tally.left:
            return None, True
        seconds |= dict(zip(Tally.SECONDS, map(float, tally.longest), strict=True))
        enough = len(tally.succeeded) >= self._needed
        succeeded = tally.succeeded if enough else []
        if enough:
            self.exchange.step(now, mean, tally)
        record = self._record(now, tally, sizes, wire, seconds)
        self.local.accept(now, succeeded)
        self.exchange.accept(now, succeeded)
        for states in self.client_states.values():
            states.reject(now.number, [k for k in now.clients if k not in succeeded])
        return record, tally.asked

    def next_round(self, earlier: Sequence[tuple[int, ...]] = ()) -> Round:
        """The round that comes next. earlier: its draws of clients that came to nothing."""
        spec, round_number = self._config.federation, self.state.rounds
        if self._guard is None:
            clients, seed = len(self.setup.rows), self._config.seed
            sampled = sampling.sample(seed, round_number, clients, spec.per_round, earlier)
        else:
            sampled = self._guard.sample(round_number)
        warm = round_number < self._config.curriculum.warmup
        split = self.sharing.split(round_number, warm, self.state.chosen)
        return Round(round_number, warm, tuple(sampled), split)

    def _train(self, now: Round, lane: list[int], progress: Progress) -> tuple[MaskedSum, Tally]:
        """This slot's clients, one after the other; their sums and numbers."""
        topology = self._topology
        asked = len(self.layout.layers) if self.exchange.measures(now) else 0
        tally = Tally(now.clients, topology.slots, asked)
        sums = self.exchange.begin(now, len(tally.numbers))
        clock, scoring = time.monotonic(), 0.0
        for k in lane:
            outcome = self._run_client(k, now, sums)
            if self.setup.engine.interrupted:
                break
            tally.note(k, outcome)
            scoring += outcome.score_seconds
            progress.client(k)
        spent = time.monotonic() - clock
        tally.seconds[topology.slot_index] = scoring, spent - scoring
        return sums, tally

    def _run_client(self, k: int, now: Round, sums: MaskedSum) -> Outcome:
        """A client's round in this slot; adds what it sends to the sums."""
        vector, has = self.results.vector(k, now), self.exchange.trains(k, now)
        correction = self.exchange.correction(k, now)
        outcome = self.local.run(k, now, vector, correction, has)
        return outcome if outcome.values is None else self.exchange.add(k, now, outcome, sums)

    def _exchange(
        self, now: Round, sums: MaskedSum, tally: Tally
    ) -> tuple[torch.Tensor, Tally, int, float]:
        """The clients' mean and everybody's numbers, the same on all ranks; the bytes on the wire,
        and the seconds it took, without waiting for the slot that took longest."""
        clock = time.monotonic()
        stop, engine = self.setup.stop, self.setup.engine
        self._enter("exchange", f"the exchange of round {now.number + 1}")
        # Losses were summed per rank, and signals may not have reached every rank. And from here on
        # every rank of the slot may read the files that its first rank has written, and, after the
        # exchange, every rank of every slot.
        summed = sum_in_slot(np.append(tally.losses, stop.asked), self._topology)
        tally.losses[:] = summed[:-1]
        tally.signal(summed[-1], engine.interrupted)
        busy = tally.seconds.sum()
        sums.stats[:] = tally.numbers
        mean, stats, wire = self.exchange.mean(now, sums)
        tally = tally.summed(stats)
        waited = float(tally.longest.sum()) - busy
        return mean, tally, wire, max(0.0, time.monotonic() - clock - waited)

    def _record(
        self,
        now: Round,
        tally: Tally,
        sizes: dict[int, tuple[int, int]],
        wire: int,
        seconds: dict[str, float],
    ) -> dict[str, Any]:
        """The round's metrics. sizes: of what each client sends, and gets, in values."""
        config, reasons = self._config, tally.reasons
        if tally.failed:
            gathered = self._topology.world.comm.allgather(reasons)
            reasons = {k: text for part in gathered for k, text in part.items()}
        known, every = self.state.clients[PERSONAL].current, config.layers.sync_every
        # Until then the personal part is as the seed has drawn it, which every client knows.
        moved = config.curriculum.warmup or (every is not None and now.number >= every)
        newcomers = [k for k in now.clients if k not in known] if moved else []
        tail = self.exchange.tail(now)
        travels = self.exchange.travelling(now)
        traffic = Traffic(sizes, travels, len(newcomers), tail.size, wire)
        record = self.account.record(now, tally, reasons, traffic, seconds)
        if tail:
            record["synced_layers"] = list(tail.layers)
        if config.curriculum.pace != "all":
            record["share"] = self.local.portion(now.number)
        record |= self.exchange.noted
        if config.curriculum.cut != "none":
            record["length"] = self.setup.cuts.length(now.number)
        if config.sparsity.keep < 1:
            densities = tally.column("density").tolist()
            record["mask_density"] = dict(zip(map(str, now.clients), densities, strict=True))
        if self.setup.privacy is not None:
            record["privacy"] = self.setup.privacy.record(now.number + 1)
        return record

    def commit(self, record: dict[str, Any]) -> None:
        """From here on a resumed run begins with the next round."""
        state = self.state
        self._enter("commit", f"committing round {state.rounds}", state.rounds)
        state.seconds.total, state.seconds.tail = self.seconds_so_far, self.setup.stop.tail
        if self._topology.is_root:
            self.setup.directory.record(record)
            self.setup.directory.commit(state)
            self.setup.engine.rehearsal.committed(
                self.setup.directory.path / tensors_of(state.rounds)
            )
        for states in self.client_states.values():
            states.sweep()

    def _enter(self, phase: str, what: str, round_number: int | None = None) -> None:
        """This rank begins a phase; round_number: from 1, None: of the round that comes next."""
        self._topology.world.watch.doing(what)
        number = self.state.rounds + 1 if round_number is None else round_number
        self.setup.engine.rehearsal.enter(phase, number)

    @property
    def seconds_so_far(self) -> float:
        """Of all lives of the run."""
        return self.setup.earlier_seconds + time.monotonic() - self.setup.started
