"""The round loop: the program's story.

state(k) + shared values -> slot's engine -> batches -> local steps -> new values
  -> packed, only the shared blocks, times n_k, added up over the slot's clients
  -> one Allreduce between slots -> server step (the same on every rank) -> commit -> next round
"""

import socket
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hpcfed import model
from hpcfed.adapters.layout import HEAD
from hpcfed.cluster.collectives import MaskedSum, sum_in_slot, sum_over_ranks
from hpcfed.cluster.stop import Stop
from hpcfed.cluster.topology import Topology, World, connect_slots, job, keep_heap_small, restarted
from hpcfed.data import partition
from hpcfed.data.batches import Ids, Tokens
from hpcfed.engine.client import Client, ClientError, StopError
from hpcfed.objectives import heads
from hpcfed.policies import sampling
from hpcfed.rounds.account import FAILED, STATS, Account, Traffic
from hpcfed.rounds.evaluation import Evaluation, Evaluator
from hpcfed.rounds.local import LocalRounds, Outcome
from hpcfed.rounds.preflight import Checked
from hpcfed.rounds.progress import Progress
from hpcfed.rounds.selection import select
from hpcfed.server import optimizer as server
from hpcfed.settings.config import Config
from hpcfed.settings.deepspeed_config import zero_stage
from hpcfed.storage import commits
from hpcfed.storage.run import Commit, RunDirectory
from hpcfed.storage.states import ClientStates

LOCK_PATIENCE = 120.0  # seconds


@dataclass(frozen=True)
class Snapshot:
    """The federation's values at one moment: those that are shared, and which file holds each
    client's personal ones (client -> round)."""

    shared: torch.Tensor  # packed
    shared_blocks: tuple[str, ...]
    states: dict[int, int]
    round: int = 0
    score: float = 0.0  # on validation


class Federation:
    """All rounds of one run, on all ranks."""

    def __init__(
        self,
        checked: Checked,
        world: World,
        started: float,
        topology: Topology | None = None,
        stop: Stop | None = None,
    ) -> None:
        """Load everything; nothing is written before all of it succeeded. A run that has begun
        goes on from its last commit.

        topology: for callers that run several configurations in one MPI world. stop: if it
        listens to signals already.
        Raises UserError, on all ranks, for anything the user can mend.
        """
        self.config: Config = checked.config
        config, settings = checked.config, checked.settings
        self.task, self.rows = checked.task, checked.rows
        self.run_directory = RunDirectory(checked.output)
        self.started = started
        commit: Commit | None = None
        with world.agreement("opening the run directory"):
            if checked.begun and world.rank == 0:
                # The earlier life of a requeued job may take a moment to end.
                commit = self.run_directory.reopen(job(), LOCK_PATIENCE if restarted() else 0.0)
        self.stop = stop or Stop(config.cluster.grace_seconds)
        self.topology = topology or connect_slots(world, config.cluster)
        if zero_stage(settings) == 3 and self.topology.device.type == "cpu":
            keep_heap_small()
        with world.agreement("reading the tokenizer"):
            tokenizer = model.load_tokenizer(config)
            head = heads.build(config, self.task, tokenizer)
            self.train_tokens, self.test_tokens = (
                head.encode(split, tokenizer, config.task.max_length)
                for split in (self.task.train, self.task.test)
            )
        with world.agreement("loading the model"):
            self.prepared = model.prepare(
                config, self.task.labels, self.train_tokens.pad_id, settings, head
            )
        self.client = Client(self.prepared, config.local, settings, self.topology, self.stop)
        self.evaluator = Evaluator(
            self.client, self.task, self.topology, config.evaluation.batch_size
        )
        self._compose()
        self.init_seconds = time.monotonic() - started
        if checked.begun:
            commits.restore(self, world.comm.bcast(commit, root=0))
        facts, here = self._facts(settings), self._here()
        with world.agreement("writing the run directory"):
            if world.rank == 0 and checked.begun:
                self.run_directory.describe_life(facts, here)
            elif world.rank == 0:
                table = partition.summary(self.task, self.rows)
                start = commits.collect(self, 0)
                self.run_directory.create(checked.resolved, facts, here, table, start, job())
        world.comm.Barrier()

    def _compose(self) -> None:
        """The method: what is shared at first, and the values everyone starts from."""
        self.layout = self.prepared.adapted.layout
        self.account = Account(self.layout)
        self.rounds_done = 0
        self.earlier_lives = self.earlier_init = 0.0  # seconds
        self.share(self.layout.blocks)
        # A client's personal values before its first round with personal layers.
        self.base = self.prepared.initial
        self.shared = self.base.clone()
        self.local = LocalRounds(
            self.config, self.client, self.rows, self.train_tokens, self.run_directory
        )
        rows = sum(len(own.train) for own in self.rows)
        # Comes into play, with the clients' control variates, when the method begins.
        self.server = server.Optimizer(self.config, len(self.rows), rows)
        self.controls = ClientStates("control", self.run_directory, self.topology.is_root)
        self.best: Snapshot | None = None

    def share(self, blocks: Sequence[str]) -> None:
        """These blocks are shared from now on; the others are their client's own."""
        self.shared_blocks = tuple(b for b in self.layout.blocks if b in blocks)
        self.personal_blocks = tuple(b for b in self.layout.blocks if b not in blocks)

    def _facts(self, settings: dict[str, Any]) -> dict[str, Any]:
        counts = {block: self.layout.count([block]) for block in self.layout.blocks}
        return {
            "model": self.prepared.source,
            "labels": list(self.task.labels),
            "backbone_values": self.prepared.backbone_values,
            "adapter_values": counts,
            "deepspeed": settings,
        }

    def _here(self) -> dict[str, Any]:
        """Where this life of the run takes place."""
        return {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "rounds_done": self.rounds_done,
            "hosts": dict(Counter(self.topology.world.comm.allgather(socket.gethostname()))),
            "ranks": self.topology.world.size,
            "slots": self.topology.slots,
            "threads": self.topology.threads,
            "device": str(self.topology.device),
        }

    def run(self, progress: Progress) -> dict[str, Any] | None:
        """Run all rounds that are left, save the shared adapter, and return summary.json's content;
        None if a signal asked to stop before: then the run can be resumed."""
        config = self.config
        progress.start(self)
        stopping = False
        while not stopping and self.rounds_done < config.federation.rounds:
            number = self.rounds_done
            if number == config.curriculum.warmup:
                try:
                    self._begin_method(number, progress)
                except StopError:
                    break
            line, stopping = self.round(number, progress)
            if line is None:
                break
            self.stop.trained()
            last = number + 1 == config.federation.rounds
            if last or (number + 1) % config.evaluation.every == 0:
                self._validate(number, line)
            self._commit(number + 1, line)
            progress.round(line)
            self.stop.committed()
        done = not stopping and self.rounds_done == config.federation.rounds
        summary = self._finish() if done else None
        if summary is not None:
            progress.finish(summary)
        else:
            progress.interrupted(self.rounds_done)
        self.run_directory.close()
        self.client.close()
        return summary

    def _commit(self, rounds: int, line: dict[str, Any]) -> None:
        """From here on a resumed run begins with the next round."""
        if self.topology.is_root:
            self.run_directory.record(line)
            self.run_directory.commit(commits.collect(self, rounds))
        self.rounds_done = rounds
        for states in commits.client_states(self).values():
            states.sweep()

    def _begin_method(self, number: int, progress: Progress) -> None:
        """After the warm-up: choose the shared layers; score the clients, if all are scored now."""
        config = self.config
        clock = time.monotonic()
        vector = self.base.clone()
        self.layout.unpack(self.shared, self.shared_blocks, vector)
        chosen = select(
            config, self.client, self.rows, self.train_tokens, self.prepared.initial, vector
        )
        self.share((*chosen.chosen, HEAD))
        self.base = vector
        self.shared = self.layout.pack(vector, self.shared_blocks)
        self.account.charged = chosen.samples
        self.account.pending = {"select": time.monotonic() - clock}

        clock = time.monotonic()
        if self.local.needs and config.curriculum.when == "start":
            self.account.charged += self._score_everyone(number, vector)
        self.account.pending["score"] = time.monotonic() - clock
        if self.topology.is_root and config.layers.score != "all":
            self.run_directory.save_selection({"round": number + 1, **chosen.record})
        progress.chose(number, chosen.record)

    def _score_everyone(self, number: int, vector: torch.Tensor) -> int:
        """Every client's difficulties, spread over the slots; returns the sample passes."""
        topology = self.topology
        sizes = {k: len(own.train) for k, own in enumerate(self.rows)}
        passes = np.zeros(len(self.rows))
        for k in sampling.spread(sizes, topology.slots)[topology.slot_index]:
            try:
                done = self.local.score(k, number, vector)
            except ClientError:
                if self.client.interrupted:
                    break
                continue  # it is scored, or fails again, in its first round
            passes[k] = done if topology.leads_slot else 0
        sum_over_ranks(passes, topology)
        self.client.leave_if_interrupted()
        self.local.lessons.keep(number, [int(k) for k in np.flatnonzero(passes)])
        return int(passes.sum())

    def round(self, number: int, progress: Progress) -> tuple[dict[str, Any] | None, bool]:
        """One round: sample, train, exchange, server step. Returns its metrics line, None if it was
        dropped because the job has to stop, and whether the job has to stop."""
        config, topology = self.config, self.topology
        clock = time.monotonic()
        sampled = sampling.sample(
            config.seed, number, config.federation.clients, config.federation.per_round
        )
        costs = {k: self.local.cost(k, number) for k in sampled}
        lane = sampling.spread(costs, topology.slots)[topology.slot_index]
        seconds = {"select": time.monotonic() - clock}

        adaptive = number >= config.curriculum.warmup
        size = len(self.shared)
        total = MaskedSum(
            size * (1 + (self.server.extras if adaptive else 0)),
            len(STATS) * len(sampled) + 2 * topology.slots + 2,
            wire=config.collective.wire,
        )
        stats = np.zeros((len(sampled), len(STATS)))
        own_seconds = np.zeros((topology.slots, 2))
        reasons: dict[int, str] = {}
        clock = time.monotonic()
        for k in lane:
            done = self._client_round(k, number, total, adaptive)
            if self.client.interrupted:
                break
            if done.values is None:
                reasons[k] = done.reason
            stats[sampled.index(k)] = (
                done.loss_sum, done.samples, done.steps, done.values is None, done.scored,
                done.density,
            )  # fmt: skip
            own_seconds[topology.slot_index, 0] += done.score_seconds
            progress.client(k)
        spent = time.monotonic() - clock - own_seconds[topology.slot_index, 0]
        own_seconds[topology.slot_index, 1] = spent

        clock = time.monotonic()
        # Losses were summed per rank, and signals may not have reached every rank. And from here on
        # every rank of the slot may read the files that its first rank has written, and, after the
        # exchange, every rank of every slot.
        summed = sum_in_slot(np.append(stats[:, 0], self.stop.asked), topology)
        stats[:, 0] = summed[:-1]
        signals = np.array([summed[-1], self.client.interrupted])
        busy = own_seconds.sum()
        total.stats[:] = np.concatenate([stats.ravel(), own_seconds.ravel(), signals])
        mean = total.mean(torch.nn.functional.pad(self.shared, (0, total.size - size)), topology)
        asked, interrupted = (bool(n) for n in mean.stats[-2:])
        if interrupted:
            return None, True
        stats = mean.stats[: stats.size].reshape(stats.shape)
        own_seconds = mean.stats[stats.size : -2].reshape(own_seconds.shape)
        longest = own_seconds[own_seconds.sum(1).argmax()]
        seconds["score"], seconds["train"] = map(float, longest)
        waited = float(longest.sum()) - busy
        seconds["exchange"] = max(0.0, time.monotonic() - clock - waited)

        well = [k for k, row in zip(sampled, stats, strict=True) if not row[FAILED]]
        if adaptive:
            steps = int(sum(row[STATS.index("steps")] for row in stats if not row[FAILED]))
            rows = sum(len(self.rows[k].train) for k in well)
            of = server.Sampled(len(well), rows, steps)
            self.shared = self.server.step(self.shared, mean.values, of)
        else:
            self.shared = mean.values
        line = self._line(number, sampled, reasons, stats, mean.wire_bytes, seconds)
        self.local.keep(number, well, bool(self.personal_blocks))
        if adaptive and self.server.keeps:
            self.controls.keep(number, well)
        return line, asked

    def _client_round(self, k: int, number: int, total: MaskedSum, adaptive: bool) -> Outcome:
        """A client's round in this slot; adds what it sends to the sums."""
        own = self.controls.load(k) if adaptive and self.server.keeps else None
        before = own["control"] if own else None
        control = self._correction(before) if adaptive else None
        done = self.local.run(k, number, self.vector(k), self.personal_blocks, control)
        if done.values is None:
            return done
        packed, control_after = self.layout.pack(done.values, self.shared_blocks), None
        if adaptive:
            gradient = done.gradient
            if gradient is not None:
                gradient = self.layout.pack(gradient, self.shared_blocks)
            rows = len(self.rows[k].train)
            message = self.server.message(self.shared, packed, before, rows, done.steps, gradient)
            packed, control_after = message.packed, message.control
        if not total.add(packed, len(self.rows[k].train)):
            return replace(
                done, values=None, loss_sum=0.0, reason="what it would send is not finite"
            )
        if control_after is not None and self.topology.leads_slot:
            self.controls.save(k, number, {"control": control_after})
        return done

    def _correction(self, own: torch.Tensor | None) -> torch.Tensor | None:
        """(layout.size,) what a client adds to its gradients; nothing on personal layers."""
        shared = self.server.correction(own, self.shared)
        if shared is None:
            return None
        vector = torch.zeros(self.layout.size)
        self.layout.unpack(shared, self.shared_blocks, vector)
        return vector

    def vector(self, client: int | None, at: Snapshot | None = None) -> torch.Tensor:
        """All trainable values of a client, now or at a snapshot: the shared ones, and its
        personal ones, or those everyone starts from."""
        at = at or self._snapshot()
        vector = self.base.clone()
        self.layout.unpack(at.shared, at.shared_blocks, vector)
        state = None if client is None else self.local.personal.load(client, at.states)
        if state is not None:
            self.layout.unpack(state["values"], self.personal_blocks, vector)
        return vector

    @property
    def seconds_so_far(self) -> float:
        """Of all lives of the run."""
        return self.earlier_lives + time.monotonic() - self.started

    def _snapshot(self) -> Snapshot:
        return Snapshot(self.shared, self.shared_blocks, self.local.personal.current)

    def _line(
        self,
        number: int,
        sampled: list[int],
        reasons: dict[int, str],
        stats: npt.NDArray[np.float64],
        wire: int,
        seconds: dict[str, float],
    ) -> dict[str, Any]:
        """The round's line in metrics.jsonl."""
        config = self.config
        if stats[:, FAILED].any():
            gathered = self.topology.world.comm.allgather(reasons)
            reasons = {k: text for part in gathered for k, text in part.items()}
        # SCAFFOLD's control variates travel both ways; those of the server do not travel at all.
        vectors = 1 + (self.server.scaffold and number >= config.curriculum.warmup)
        known = self.local.personal.current
        newcomers = [k for k in sampled if k not in known] if config.curriculum.warmup else []
        personal = self.layout.count(self.personal_blocks)
        traffic = Traffic(self.shared_blocks, vectors, len(newcomers), personal, wire)
        line = self.account.line(number, sampled, reasons, stats, traffic, seconds)
        if config.curriculum.pace != "all":
            line["share"] = self.local.share(number)
        if config.sparsity.keep < 1:
            densities = stats[:, STATS.index("density")].tolist()
            line["mask_density"] = dict(zip(map(str, sampled), densities, strict=True))
        return line

    def _validate(self, number: int, line: dict[str, Any]) -> None:
        """Validation metrics of the current values; remembers the best round."""
        clock = time.monotonic()
        rows = [own.validation for own in self.rows]
        if sum(map(len, rows)):
            now = self._snapshot()
            found = self._evaluate(rows, self.train_tokens, now)
            line["validation"] = {name: result.scores for name, result in found.items()}
            score = found["personal"].scores["score"]
            if self.best is None or score > self.best.score:
                self.best = replace(
                    now, states=self.local.personal.pin(), round=number, score=score
                )
        self.account.evaluated(time.monotonic() - clock, line)

    def _evaluate(self, rows: list[Ids], tokens: Tokens, at: Snapshot) -> dict[str, Evaluation]:
        """Personal and global results on rows[k] of every client k; one pass if they coincide."""
        personal = self.evaluator.evaluate(rows, tokens, at.states, lambda k: self.vector(k, at))
        if not at.states:
            return {"personal": personal, "global": personal}
        start = self.vector(None, at)
        return {
            "personal": personal,
            "global": self.evaluator.evaluate(rows, tokens, {}, lambda _: start),
        }

    def _test(self, at: Snapshot) -> dict[str, Evaluation]:
        return self._evaluate([own.test for own in self.rows], self.test_tokens, at)

    def _finish(self) -> dict[str, Any]:
        """The test split, used here for the first time; the adapter; the summary."""
        clock = time.monotonic()
        config = self.config
        results = self._test(self._snapshot())
        final = {name: result.scores for name, result in results.items()}
        best = None
        if self.best is not None:
            same = self.best.round + 1 == config.federation.rounds
            found = results if same else self._test(self.best)
            best = {
                "round": self.best.round + 1,
                "validation": self.best.score,
                **{name: result.scores for name, result in found.items()},
            }
        self.account.evaluated(time.monotonic() - clock)
        summary = {
            "method": config.method,
            "task": config.task.name,
            "seed": config.seed,
            "rounds": config.federation.rounds,
            "metric": self.task.metric,
            "accuracy": {name: result["accuracy"] for name, result in final.items()},
            "score": {name: result["score"] for name, result in final.items()},
            "majority": float(np.bincount(self.test_tokens.labels).max() / len(self.test_tokens)),
            "test": final,
            "best": best,
            **self.account.summary(),
            "seconds": {
                "init": self.earlier_init + self.init_seconds,
                **self.account.seconds,
                "total": self.seconds_so_far,
            },
            "shared_layers": [block for block in self.shared_blocks if block != HEAD],
        }
        if self.topology.is_root:
            self.run_directory.save_adapter(
                self.prepared.adapted,
                self.vector(None),
                self.prepared.fresh,
                self.task.labels,
                self.prepared.source,
            )
            self.run_directory.save_predictions(self.task.labels, self.test_tokens.labels, results)
            self.run_directory.save_summary(summary)
        self.topology.world.comm.Barrier()
        return summary
