"""The round loop: the program's story.

state(k) + shared values -> slot's engine -> batches -> local steps -> new values
  -> packed, only the shared blocks, times n_k, added up over the slot's clients
  -> one Allreduce between slots -> server step (the same on every rank) -> next round
"""

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from hpcfed import model, server
from hpcfed.adapters.layout import HEAD
from hpcfed.client import Client, ClientError
from hpcfed.collectives import MaskedSum
from hpcfed.config import Config
from hpcfed.data import partition
from hpcfed.data.batches import Ids, Tokens, form_batches, tokenize
from hpcfed.deepspeed_config import zero_stage
from hpcfed.evaluation import Evaluator
from hpcfed.policies import layers, sampling
from hpcfed.preflight import Checked
from hpcfed.progress import Progress
from hpcfed.rng import derive, generator
from hpcfed.run import RunDirectory
from hpcfed.topology import Topology, World, connect_slots, keep_heap_small

FP32_BYTES = 4


@dataclass
class Totals:
    """What the run has cost so far; the names are those of summary.json."""

    samples: int = 0
    steps: int = 0
    failures: int = 0
    up: int = 0
    down: int = 0
    wire: int = 0


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
            self.train_tokens = tokenize(self.task.train, tokenizer, config.task.max_length)
            self.test_tokens = tokenize(self.task.test, tokenizer, config.task.max_length)
        with world.agreement("loading the model"):
            self.prepared = model.prepare(
                config, self.task.labels, self.train_tokens.pad_id, settings
            )
        self.client = Client(self.prepared, config.local, settings, self.topology)
        self.evaluator = Evaluator(
            self.client, self.task, self.topology, config.evaluation.batch_size
        )
        self._compose()
        self.totals = Totals()
        self.seconds = {"select": 0.0, "train": 0.0, "exchange": 0.0, "evaluate": 0.0}
        if self.topology.is_root:
            self.run_directory.create(
                checked.resolved, self._facts(settings), partition.summary(self.task, self.rows)
            )
        world.comm.Barrier()
        self.started = started
        self.init_seconds = time.monotonic() - started

    def _compose(self) -> None:
        """The method: which blocks are shared, and the values everyone starts from."""
        config, layout = self.config, self.prepared.adapted.layout
        chosen = layers.choose(
            config.layers.score,
            config.layers.keep,
            layout.layers,
            generator(config.seed, "layers"),
        )
        self.layout = layout
        self.shared_blocks = (*chosen, HEAD)
        self.personal_blocks = tuple(b for b in layout.blocks if b not in self.shared_blocks)
        self.initial = self.prepared.initial
        self.shared = layout.pack(self.initial, self.shared_blocks)
        self.states: dict[int, int] = {}  # client -> round of its last personal values
        self.best: tuple[float, int, torch.Tensor, dict[int, int]] | None = None

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

    def round(self, number: int, progress: Progress) -> dict[str, Any]:
        """One round: sample, train, exchange, server step. Returns its metrics line."""
        config, topology = self.config, self.topology
        clock = time.monotonic()
        sampled = sampling.sample(
            config.seed, number, config.federation.clients, config.federation.per_round
        )
        lengths = self.train_tokens.lengths  # every epoch meets every row once
        costs = {k: int(lengths[self.rows[k].train].sum()) for k in sampled}
        lane = sampling.spread(costs, topology.slots)[topology.slot_index]
        seconds = {"select": time.monotonic() - clock}

        clock = time.monotonic()
        total = MaskedSum(
            self.layout.count(self.shared_blocks),
            4 * len(sampled) + topology.slots,
            wire=config.collective.wire,
        )
        stats = np.zeros((len(sampled), 4))  # loss sum, samples, steps, failed
        reasons: dict[int, str] = {}
        for k in lane:
            reason = self._train(
                k, number, self._batches(number, k), total, stats[sampled.index(k)]
            )
            if reason:
                reasons[k] = reason
            progress.client(k)
        own_train = time.monotonic() - clock

        clock = time.monotonic()
        if topology.ranks_per_client > 1:  # losses were summed per rank
            stats[:, 0] = topology.slot.allreduce(stats[:, 0])
        slot_seconds = np.zeros(topology.slots)
        slot_seconds[topology.slot_index] = own_train
        total.stats[:] = np.concatenate([stats.ravel(), slot_seconds])
        mean = total.mean(self.shared, topology)
        stats = mean.stats[: stats.size].reshape(stats.shape)
        seconds["train"] = float(mean.stats[stats.size :].max())
        waited = seconds["train"] - own_train
        seconds["exchange"] = max(0.0, time.monotonic() - clock - waited)

        failed = [k for k, row in zip(sampled, stats, strict=True) if row[3]]
        self.shared = server.step(self.shared, mean.values, config.server.optimizer)
        self._keep_states(number, [k for k in sampled if k not in failed])
        return self._line(number, sampled, failed, reasons, stats, mean.wire_bytes, seconds)

    def _batches(self, number: int, client: int) -> list[Ids]:
        """Batches of a client's local epochs in a round."""
        config = self.config
        return [
            batch
            for epoch in range(config.local.epochs)
            for batch in form_batches(
                self.rows[client].train,
                self.train_tokens.lengths,
                config.local.batch_size,
                generator(config.seed, "batches", number, client, epoch),
            )
        ]

    def _train(
        self,
        client: int,
        number: int,
        batches: list[Ids],
        total: MaskedSum,
        stats: np.ndarray[Any, np.dtype[np.float64]],
    ) -> str:
        """Train one client in this slot and add its update; returns why it failed, or ""."""
        self.client.load(self._vector(client))
        seed = derive(self.config.seed, "dropout", number, client, self.topology.rank_in_slot)
        reason = ""
        try:
            done = self.client.train(batches, self.train_tokens, seed)
            values = self.client.read()
            weight = len(self.rows[client].train)
            if not bool(torch.isfinite(values).all()):
                reason = "its values are not finite after training"
            else:
                total.add(self.layout.pack(values, self.shared_blocks), weight)
                stats[0] = done.loss_sum
                if self.topology.leads_slot and self.personal_blocks:
                    personal = self.layout.pack(values, self.personal_blocks)
                    self.run_directory.save_personal(client, number, personal)
            stats[1:3] = done.samples, done.steps
        except ClientError as failure:
            reason = str(failure)
        stats[3] = bool(reason)
        return reason

    def _vector(self, client: int | None) -> torch.Tensor:
        """All trainable values of a client: the shared ones, and its personal or initial ones."""
        return self._vector_at(client, self.shared, self.states)

    def _vector_at(
        self, client: int | None, shared: torch.Tensor, states: dict[int, int]
    ) -> torch.Tensor:
        vector = self.initial.clone()
        self.layout.unpack(shared, self.shared_blocks, vector)
        if client is not None and client in states:
            personal = self.run_directory.load_personal(client, states[client])
            self.layout.unpack(personal, self.personal_blocks, vector)
        return vector

    def _keep_states(self, number: int, clients: list[int]) -> None:
        """From now on these clients' personal values are this round's; drop unreferenced ones."""
        if not self.personal_blocks:
            return
        for k in clients:
            old = self.states.get(k)
            self.states[k] = number
            if old is not None and self.topology.is_root and not self._best_uses(k, old):
                self.run_directory.drop_personal(k, old)

    def _best_uses(self, client: int, number: int) -> bool:
        return self.best is not None and self.best[3].get(client) == number

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
        up, down = (len(sampled) - len(failed)) * values, len(sampled) * values
        samples, steps = int(stats[:, 1].sum()), int(stats[:, 2].sum())
        trained = float(stats[:, 1] @ (1 - stats[:, 3]))
        self.totals.samples += samples
        self.totals.steps += steps
        self.totals.failures += len(failed)
        self.totals.up += up * FP32_BYTES
        self.totals.down += down * FP32_BYTES
        self.totals.wire += wire
        for phase, value in seconds.items():
            self.seconds[phase] += value
        return {
            "round": number + 1,
            "clients": sampled,
            "failed": {str(k): reasons.get(k, "") for k in failed},
            "train_loss": float(stats[:, 0].sum() / trained) if trained else None,
            "samples": samples,
            "steps": steps,
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
            found = self._evaluate(rows, self.train_tokens, self.shared, self.states)
            line["validation"], personal = found, found["personal"]
            if self.best is None or personal["score"] > self.best[0]:
                stale = self.best[3] if self.best else {}
                self.best = (personal["score"], number, self.shared, dict(self.states))
                for k, old in stale.items():
                    if self.states.get(k) != old and self.topology.is_root:
                        self.run_directory.drop_personal(k, old)
        line["seconds"]["evaluate"] = time.monotonic() - clock
        self.seconds["evaluate"] += line["seconds"]["evaluate"]

    def _evaluate(
        self, rows: list[Ids], tokens: Tokens, shared: torch.Tensor, states: dict[int, int]
    ) -> dict[str, Any]:
        """Personal and global metrics on rows[k] of every client k; one pass if they coincide."""
        personal = self.evaluator.personal(
            rows, tokens, states, lambda k: self._vector_at(k, shared, states)
        )
        if not self.personal_blocks:
            return {"personal": personal, "global": personal}
        start = self._vector_at(None, shared, states)
        return {
            "personal": personal,
            "global": self.evaluator.personal(rows, tokens, {}, lambda _: start),
        }

    def _test(self, shared: torch.Tensor, states: dict[int, int]) -> dict[str, Any]:
        return self._evaluate([own.test for own in self.rows], self.test_tokens, shared, states)

    def _finish(self) -> dict[str, Any]:
        """The test split, used here for the first time; the adapter; the summary."""
        clock = time.monotonic()
        config, totals = self.config, self.totals
        final = self._test(self.shared, self.states)
        best = None
        if self.best is not None:
            score, number, shared, states = self.best
            same = number + 1 == config.federation.rounds
            best = {
                "round": number + 1,
                "validation": score,
                **(final if same else self._test(shared, states)),
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
            "steps": totals.steps,
            "bytes": {k: v for k, v in asdict(totals).items() if k in ("up", "down", "wire")},
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
                self._vector(None),
                self.prepared.fresh,
                self.task.labels,
                self.prepared.source,
            )
            self.run_directory.save_summary(summary)
        self.topology.world.comm.Barrier()
        return summary
