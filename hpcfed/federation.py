"""The round loop: the program's story.

state(k) + shared values -> slot's engine -> batches -> local steps -> new values
  -> packed, only the shared blocks, times n_k, added up over the slot's clients
  -> one Allreduce between slots -> server step (the same on every rank) -> next round
"""

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from hpcfed import heads, model, server
from hpcfed.adapters.layout import HEAD
from hpcfed.client import Client, ClientError
from hpcfed.collectives import MaskedSum, sum_in_slot, sum_over_ranks
from hpcfed.config import Config
from hpcfed.data import partition
from hpcfed.data.batches import Ids, Tokens
from hpcfed.deepspeed_config import zero_stage
from hpcfed.evaluation import Evaluation, Evaluator
from hpcfed.local import LocalRounds, Outcome
from hpcfed.policies import sampling
from hpcfed.preflight import Checked
from hpcfed.progress import Progress
from hpcfed.run import RunDirectory
from hpcfed.selection import select
from hpcfed.states import ClientStates
from hpcfed.topology import Topology, World, connect_slots, keep_heap_small

FP32_BYTES = 4

# Of each sampled client, on the same wire as the values.
STATS = ("loss_sum", "samples", "steps", "failed", "scored", "density")


@dataclass
class Totals:
    """What the run has cost so far; the names are those of summary.json."""

    samples: int = 0
    scored: int = 0
    steps: int = 0
    updates: int = 0
    failures: int = 0
    up: int = 0
    down: int = 0
    wire: int = 0


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
        self, checked: Checked, world: World, started: float, topology: Topology | None = None
    ) -> None:
        """Load everything; nothing is written before all of it succeeded.

        topology: for callers that run several configurations in one MPI world.
        Raises UserError, on all ranks, for anything the user can mend.
        """
        self.config: Config = checked.config
        config, settings = checked.config, checked.settings
        self.task, self.rows = checked.task, checked.rows
        self.run_directory = RunDirectory(checked.output)
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
        self.client = Client(self.prepared, config.local, settings, self.topology)
        self.evaluator = Evaluator(
            self.client, self.task, self.topology, config.evaluation.batch_size
        )
        self._compose()
        self.totals = Totals()
        # Sample passes and seconds of selecting and scoring, which the next round's line carries.
        self.charged = 0
        self.pending: dict[str, float] = {}
        self.seconds = dict.fromkeys(("select", "score", "train", "exchange", "evaluate"), 0.0)
        if self.topology.is_root:
            self.run_directory.create(
                checked.resolved, self._facts(settings), partition.summary(self.task, self.rows)
            )
        world.comm.Barrier()
        self.started = started
        self.init_seconds = time.monotonic() - started

    def _compose(self) -> None:
        """The method: what is shared at first, and the values everyone starts from."""
        self.layout = self.prepared.adapted.layout
        self.shared_blocks = self.layout.blocks
        self.personal_blocks: tuple[str, ...] = ()
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

    def _facts(self, settings: dict[str, Any]) -> dict[str, Any]:
        counts = {block: self.layout.count([block]) for block in self.layout.blocks}
        return {
            "model": self.prepared.source,
            "labels": list(self.task.labels),
            "ranks": self.topology.world.size,
            "slots": self.topology.slots,
            "threads": self.topology.threads,
            "device": str(self.topology.device),
            "backbone_values": self.prepared.backbone_values,
            "adapter_values": counts,
            "deepspeed": settings,
        }

    def run(self, progress: Progress) -> dict[str, Any]:
        """Run all rounds, save the shared adapter, and return summary.json's content."""
        config = self.config
        progress.start(self)
        for number in range(config.federation.rounds):
            if number == config.curriculum.warmup:
                self._begin_method(number, progress)
            line = self.round(number, progress)
            last = number + 1 == config.federation.rounds
            if last or (number + 1) % config.evaluation.every == 0:
                self._validate(number, line)
            if self.topology.is_root:
                self.run_directory.record(line)
            progress.round(line)
        summary = self._finish()
        progress.finish(summary)
        self.client.close()
        return summary

    def _begin_method(self, number: int, progress: Progress) -> None:
        """After the warm-up: choose the shared layers; score the clients, if all are scored now."""
        config = self.config
        clock = time.monotonic()
        vector = self.base.clone()
        self.layout.unpack(self.shared, self.shared_blocks, vector)
        chosen = select(
            config, self.client, self.rows, self.train_tokens, self.prepared.initial, vector
        )
        self.shared_blocks = tuple(b for b in self.layout.blocks if b in (*chosen.chosen, HEAD))
        self.personal_blocks = tuple(b for b in self.layout.blocks if b not in self.shared_blocks)
        self.base = vector
        self.shared = self.layout.pack(vector, self.shared_blocks)
        self.charged = chosen.samples
        self.pending = {"select": time.monotonic() - clock}

        clock = time.monotonic()
        if self.local.needs and config.curriculum.when == "start":
            self.charged += self._score_everyone(number, vector)
        self.pending["score"] = time.monotonic() - clock
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
                continue  # it is scored, or fails again, in its first round
            passes[k] = done if topology.leads_slot else 0
        sum_over_ranks(passes, topology)
        self.local.lessons.keep(number, [int(k) for k in np.flatnonzero(passes)])
        return int(passes.sum())

    def round(self, number: int, progress: Progress) -> dict[str, Any]:
        """One round: sample, train, exchange, server step. Returns its metrics line."""
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
            len(STATS) * len(sampled) + 2 * topology.slots,
            wire=config.collective.wire,
        )
        stats = np.zeros((len(sampled), len(STATS)))
        own_seconds = np.zeros((topology.slots, 2))
        reasons: dict[int, str] = {}
        clock = time.monotonic()
        for k in lane:
            done = self._client_round(k, number, total, adaptive)
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
        # Losses were summed per rank. And from here on every rank of the slot may read the files
        # that its first rank has written, and, after the exchange, every rank of every slot.
        stats[:, 0] = sum_in_slot(stats[:, 0].copy(), topology)
        busy = own_seconds.sum()
        total.stats[:] = np.concatenate([stats.ravel(), own_seconds.ravel()])
        mean = total.mean(torch.nn.functional.pad(self.shared, (0, total.size - size)), topology)
        stats = mean.stats[: stats.size].reshape(stats.shape)
        own_seconds = mean.stats[stats.size :].reshape(own_seconds.shape)
        longest = own_seconds[own_seconds.sum(1).argmax()]
        seconds["score"], seconds["train"] = map(float, longest)
        waited = float(longest.sum()) - busy
        seconds["exchange"] = max(0.0, time.monotonic() - clock - waited)

        failed = [k for k, row in zip(sampled, stats, strict=True) if row[3]]
        well = [k for k in sampled if k not in failed]
        if adaptive:
            steps = int(sum(row[2] for row in stats if not row[3]))
            rows = sum(len(self.rows[k].train) for k in well)
            of = server.Sampled(len(well), rows, steps)
            self.shared = self.server.step(self.shared, mean.values, of)
        else:
            self.shared = mean.values
        line = self._line(number, sampled, failed, reasons, stats, mean.wire_bytes, seconds)
        self.local.keep(number, well, bool(self.personal_blocks))
        if adaptive and self.server.keeps:
            self.controls.keep(number, well)
        return line

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
            return replace(done, values=None, reason="what it would send is not finite")
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

    def _snapshot(self) -> Snapshot:
        return Snapshot(self.shared, self.shared_blocks, self.local.personal.current)

    def _line(
        self,
        number: int,
        sampled: list[int],
        failed: list[int],
        reasons: dict[int, str],
        stats: np.ndarray[Any, np.dtype[np.float64]],
        wire: int,
        seconds: dict[str, float],
    ) -> dict[str, Any]:
        """The round's line in metrics.jsonl, and its share of the totals."""
        if failed:
            gathered = self.topology.world.comm.allgather(reasons)
            reasons = {k: text for part in gathered for k, text in part.items()}
        values = self.layout.count(self.shared_blocks)
        head = self.layout.count([HEAD])
        # SCAFFOLD's control variates travel both ways; those of the server do not travel at all.
        each = 1 + (self.server.scaffold and number >= self.config.curriculum.warmup)
        up, down = (len(sampled) - len(failed)) * values * each, len(sampled) * values * each
        if self.config.curriculum.warmup:  # what the warm-up made of the layers that stay home
            new = [k for k in sampled if k not in self.local.personal.current]
            down += len(new) * self.layout.count(self.personal_blocks)
        scored = int(stats[:, 4].sum()) + self.charged
        self.charged = 0
        samples, steps = int(stats[:, 1].sum()) + scored, int(stats[:, 2].sum())
        trained = float(stats[:, 1] @ (1 - stats[:, 3]))
        self.totals.samples += samples
        self.totals.scored += scored
        self.totals.steps += steps
        self.totals.failures += len(failed)
        self.totals.updates += len(sampled) - len(failed)
        self.totals.up += up * FP32_BYTES
        self.totals.down += down * FP32_BYTES
        self.totals.wire += wire
        for phase, value in self.pending.items():
            seconds[phase] += value
        self.pending = {}
        for phase, value in seconds.items():
            self.seconds[phase] += value
        method: dict[str, Any] = {}
        if self.config.curriculum.pace != "all":
            method["share"] = self.local.share(number)
        if self.config.sparsity.keep < 1:
            densities = stats[:, 5].tolist()
            method["mask_density"] = dict(zip(map(str, sampled), densities, strict=True))
        return {
            "round": number + 1,
            "clients": sampled,
            "failed": {str(k): reasons.get(k, "") for k in failed},
            "train_loss": float(stats[:, 0].sum() / trained) if trained else None,
            "samples": samples,
            "scored": scored,
            "steps": steps,
            **method,
            "shared_layers": [b for b in self.shared_blocks if b != HEAD],
            "values": {"up": up, "down": down, "head": head},
            "bytes": {
                "up": up * FP32_BYTES,
                "down": down * FP32_BYTES,
                "wire": wire,
                "up_without_head": (up - (len(sampled) - len(failed)) * head) * FP32_BYTES,
            },
            "seconds": {**seconds, "evaluate": 0.0},
        }

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
        line["seconds"]["evaluate"] = time.monotonic() - clock
        self.seconds["evaluate"] += line["seconds"]["evaluate"]

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
        config, totals = self.config, self.totals
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
        self.seconds["evaluate"] += time.monotonic() - clock
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
            "samples": totals.samples,
            "scored": totals.scored,
            "steps": totals.steps,
            "bytes": {
                "up": totals.up,
                "down": totals.down,
                "wire": totals.wire,
                "up_if_all_shared": totals.updates * self.layout.size * FP32_BYTES,
            },
            "seconds": {
                "init": self.init_seconds,
                **self.seconds,
                "total": time.monotonic() - self.started,
            },
            "shared_layers": [block for block in self.shared_blocks if block != HEAD],
            "failures": totals.failures,
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
