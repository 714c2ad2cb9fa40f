"""One slot's DeepSpeed ZeRO engine: load a client's values, train, evaluate, read them back.

Writing param.data into a ZeRO engine is undone by the next step, because the fp32 master copy
wins; so `load` writes the master and the working copy, at every stage, and drops all optimizer
state. This is the only file that touches DeepSpeed's engine.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from hpcfed.adapters.layout import AdapterLayout
from hpcfed.cluster.stop import Stop
from hpcfed.cluster.topology import Topology
from hpcfed.data.batches import Ids, Tokens, split_batch
from hpcfed.engine import lean
from hpcfed.engine.failures import ClientError, Failures, StopError
from hpcfed.engine.masters import STEPS, Masters
from hpcfed.engine.observer import Observer
from hpcfed.engine.optimizer import make_optimizer
from hpcfed.engine.prediction import predict
from hpcfed.engine.recovery import discard, recover
from hpcfed.engine.trained import Trained
from hpcfed.engine.values import Values
from hpcfed.errors import UserError
from hpcfed.faults import Rehearsal
from hpcfed.importance.fisher import PerSampleGradients
from hpcfed.importance.sensitivity import BlockWatch
from hpcfed.model import Prepared
from hpcfed.settings.config import Local
from hpcfed.settings.deepspeed_config import zero_stage

# ZeRO-3 replaces this function for good, by one that rounds differently: without putting it back,
# the next engine of the process would not have the bits it has in a process of its own.
_LINEAR = nn.functional.linear

# What a rank reports to its slot in place of a problem, if the round has to be dropped.
_STOPPING = "the job has to stop"
_LOSS = "the loss is not finite"
_GRADIENT = "its gradient is not finite"


class Engine:
    """Trains a slot's clients, one after the other. Every method is collective over its ranks."""

    def __init__(
        self,
        prepared: Prepared,
        local: Local,
        settings: dict[str, Any],
        topology: Topology,
        stop: Stop | None = None,
    ) -> None:
        import deepspeed

        adapted = prepared.adapted
        self.layout: AdapterLayout = adapted.layout
        self.topology = topology
        self.stage = zero_stage(settings)
        self.checkpointing = prepared.checkpointing
        self._local = local
        self._stop = stop
        self.rehearsal = Rehearsal.from_environment(topology.world.rank)
        shared = self.stage == 3 and topology.ranks_per_client > 1
        self.failures = Failures(adapted.network, collective=shared)
        # Whether a step was left because the job has to stop; the same on all ranks of the slot.
        self.interrupted = False
        self.head = prepared.head
        # The module inside DeepSpeed's engine; its values go through load and read.
        self.model = adapted.network
        self.parameters, residual = adapted.split()
        self.watch = BlockWatch(adapted.blocks)
        # Modules with trained values -> the entries that are its weight and, if any, its bias.
        self.owners = adapted.owners()
        self.taps = PerSampleGradients(list(self.owners))
        self.precise = not settings.get("bf16", {}).get("enabled")
        dtype = self.parameters[0].dtype
        self._deepspeed, *_ = deepspeed.initialize(
            model=adapted.network,
            model_parameters=self.parameters,
            optimizer=make_optimizer(self.parameters, local),
            config=settings,
            dist_init_required=False,
        )
        # At stage 0 the ranks of a slot agree that backward came through before they add up
        # gradients; later stages add them up while backward runs.
        self._agrees = self.stage == 0 and topology.ranks_per_client > 1
        lean.leave_out_what_is_idle(self._deepspeed, self.stage, topology.ranks_per_client)
        # On the device, like the losses: to read them, the host would wait for each step.
        self._invalid = torch.zeros((), dtype=torch.bool, device=topology.device)
        self._masters = Masters(self.parameters, self._deepspeed, self.stage)
        self._values = Values(self.parameters, residual, self.layout, self.stage, topology)
        lowered = self._deepspeed.torch_autocast_enabled() or self._deepspeed.fp16_enabled()
        masters = {master.dtype for master in self._masters.tensors()}
        if lowered or {p.dtype for p in self.parameters} != {dtype} or masters != {torch.float32}:
            self.close()
            raise UserError(
                "DeepSpeed would train in another precision than model.dtype and fp32 masters; "
                "remove from its JSON what sets one."
            )

    def load(
        self,
        vector: torch.Tensor,
        trainable: torch.Tensor | None = None,
        moments: dict[str, torch.Tensor] | None = None,
        control: torch.Tensor | None = None,
        rate: float | None = None,
        senses: bool = False,
    ) -> None:
        """Make the trainable values equal `vector` (layout.size,) fp32 on the CPU, with no trace
        of an earlier client: master copy, working copy, and a fresh optimizer.

        trainable: (layout.size,) bool; what is False stays bit for bit as it is until the next
        load, has no gradient before clipping, no moment and no weight decay. None: all train.
        moments: what `moments` gave after this client's last round. control: (layout.size,), added
        to each gradient. rate: of learning; None: the configured one. senses: for `importance`.
        """
        masters = self._masters
        masters.set_rate(self._local.lr if rate is None else rate)
        masters.release()
        absent = None if trainable is None or bool(trainable.all()) else ~trainable
        # Written like values, a vector takes the order of DeepSpeed's own partitions.
        parts = {
            name: self._in_master_order(value if absent is None else value.masked_fill(absent, 0))
            for name, value in (moments or {}).items()
            if name != STEPS
        }
        added = None if control is None else self._in_master_order(control)
        where = None if absent is None else self._in_master_order(absent.float())
        self._values.write(vector)
        self._values.place(vector)
        if absent is not None and where is not None:
            masters.freeze(self._values.shaped(absent), [part > 0.5 for part in where])
        if moments:
            masters.set_moments(parts, int(moments[STEPS]))
        if added is not None:
            masters.add(added)
        if self._local.proximal:
            masters.pull(self._local.proximal)
        if senses:
            masters.sense()

    def _in_master_order(self, vector: torch.Tensor) -> list[torch.Tensor]:
        if self.stage == 0:  # the masters are the parameters
            return self._values.shaped(vector)
        self._values.write(vector)
        return self._masters.copies()

    def _in_layout_order(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Spoils the engine's values."""
        self._masters.fill(parts)
        return self._values.read(from_master=self.stage > 0)

    def moments(self, steps: int) -> dict[str, torch.Tensor]:
        """What the optimizer remembers, for a later `load`, `steps` steps after it was fresh.

        By name (layout.size,) fp32. Spoils the values: read them before, load afterwards.
        """
        moments = self._masters.moments()
        vectors = {name: self._in_layout_order(parts) for name, parts in moments.items()}
        return {**vectors, STEPS: torch.tensor(steps)}

    def mean_gradient(self, steps: int) -> torch.Tensor:
        """(layout.size,) fp32: the mean over `steps` steps of what the optimizer would have got
        without the control vector. Spoils the values: read them before, load afterwards."""
        return self._in_layout_order([part / steps for part in self._masters.gradients()])

    def importance(self, steps: int) -> torch.Tensor:
        """(layout.size,) fp32: how much each value mattered in the `steps` steps since `load`, see
        `Masters.sense`. Spoils the values: read them before, load afterwards."""
        return self._in_layout_order(self._masters.importance(steps))

    def read(self) -> torch.Tensor:
        """The trainable values (layout.size,) fp32 on the CPU, the same on all ranks of the slot;
        exact for fp32, and for bf16 exact in the fp32 master."""
        return self._values.read(from_master=self.stage == 3 or not self.precise)

    def train(
        self, batches: Sequence[Ids], tokens: Tokens, dropout_seed: int, observe: bool = False
    ) -> Trained:
        """One optimizer step per batch of row numbers; the mean loss of a batch is over its true
        number of samples, however they fall to ranks and micro-steps.

        observe: take each row's loss and Fisher trace, and the neurons' Fisher, along.
        Raises ClientError on all ranks of the slot if any rank fails outside a collective.
        """
        topology = self.topology
        torch.manual_seed(dropout_seed)
        self._deepspeed.train()
        result = Trained()
        total = torch.zeros((), dtype=torch.float64, device=topology.device)
        seen: Observer | None = None
        if observe and len(batches):
            seen = Observer(self.layout, self.owners, self.taps, topology, len(tokens))
        for batch in batches:
            micro_steps = self.micro_batches(batch)
            # DeepSpeed averages over the ranks: ranks / len(batch) makes it the batch's mean.
            scale = topology.ranks_per_client / len(batch)
            if self.model.penalty is not None:
                self.model.penalty.share = 1 / len(micro_steps)
            if seen:
                seen.forget(batch)
            for number, rows in enumerate(micro_steps):
                self._deepspeed.set_gradient_accumulation_boundary(number == len(micro_steps) - 1)
                if seen:
                    seen.begin(len(rows), scale)
                try:
                    losses = self.forward(rows, batch, tokens)
                except ClientError:
                    self.taps.listen(None)
                    self.discard(number > 0)
                    raise
                self.backward(losses.sum() * scale)
                if seen and len(rows):
                    seen.end(rows, losses)
                total += losses.detach().sum()
            self.step(total)
            result.samples += len(batch)
            result.tokens += int(tokens.lengths[batch].sum())
            result.steps += 1
        self.taps.listen(None)
        result.loss_sum = self.loss_sum(total)
        if seen:
            result.rows = np.unique(np.concatenate(list(batches)))
            observed = seen.whole(result.rows, result.samples)
            result.losses, result.fisher, result.neurons = observed
        return result

    def backward(self, loss: torch.Tensor) -> None:
        """Raises ClientError if it fails where no rank waits for this one."""
        problem = self._tried(lambda: self._deepspeed.backward(loss, scale_wrt_gas=False))
        if self._agrees:
            problem = self._first_problem(problem)
            if not problem:
                self._deepspeed.allreduce_gradients()
        if problem:
            self._recover()
            raise ClientError(problem)

    def step(self, total: torch.Tensor) -> None:
        """The optimizer's step; total: the losses so far. Raises ClientError if it fails where no
        rank waits for this one, or was left out."""
        skipped = self._deepspeed.skipped_steps
        problem = self._tried(self._deepspeed.step)
        if problem:
            self._recover()
        elif self._deepspeed.skipped_steps > skipped:  # the ranks of the slot agree on that
            problem = "" if math.isfinite(total.item()) else _LOSS
            problem = self._first_problem(problem) or _GRADIENT
        else:
            self._invalid |= lean.invalid(self._deepspeed, self.topology.device)
        if problem:
            self.taps.listen(None)
            raise ClientError(problem)

    def loss_sum(self, total: torch.Tensor) -> float:
        """What the losses of all steps since the last call add up to on this rank. Raises
        ClientError on all ranks of the slot if it or a step's gradient is not finite."""
        # One number to wait for; no loss is -inf.
        invalid = self._invalid & torch.isfinite(total)
        loss = float(total.masked_fill(invalid, -math.inf).item())
        self._invalid.zero_()
        problem = _GRADIENT if loss == -math.inf else "" if math.isfinite(loss) else _LOSS
        if problem := self._first_problem(problem):
            raise ClientError(problem)
        return loss

    def _tried(self, act: Callable[[], Any]) -> str:
        """Why it failed, or ""; with other ranks that wait for this one in a collective of
        DeepSpeed's, failures are raised, and end the job."""
        try:
            act()
        except Exception as error:
            if self.topology.ranks_per_client > 1 and not self._agrees:
                raise
            return self.failures.told(error)
        return ""

    def _recover(self) -> None:
        """Out of a backward or a step that was left in the middle: forget what is half reduced,
        counted or gathered. Values and optimizer state are spoiled, and overwritten by the next
        load."""
        self.taps.listen(None)
        recover(self._deepspeed, self.stage, self.model, self.topology.device)

    def micro_batches(self, batch: Ids) -> list[Ids]:
        """This rank's rows of the batch, micro-step by micro-step."""
        topology = self.topology
        micro_steps = split_batch(batch, topology.ranks_per_client, self._local.micro_batch)
        return [step[topology.rank_in_slot] for step in micro_steps]

    def forward(self, rows: Ids, batch: Ids, tokens: Tokens, probing: bool = False) -> torch.Tensor:
        """(len(rows) or 1,) fp32 losses of this rank's rows, differentiable.

        A rank without rows still takes part in the collectives, with a sample of `batch` at weight
        zero. Raises ClientError on all ranks of the slot if it fails on any, unless others wait
        (Failures.told). probing: for gradients by autograd, which only DeepSpeed's module allows.
        """
        network = self.model if probing else self._deepspeed
        filled = rows if len(rows) else batch[:1]
        problem = ""
        losses = torch.zeros(1)
        try:
            losses = self.head.losses(network, tokens, filled, self.topology.device)
            self.taps.end_forward()
            if not probing:
                losses = self.rehearsal.losses(losses, self.parameters[0])
            if not len(rows):
                losses = losses * 0.0
            # In training a step tells: a loss that is not finite has no finite gradient.
            if probing and not math.isfinite(losses.sum().item()):
                problem = _LOSS
        except Exception as error:
            problem = self.failures.told(error)
        self.topology.world.watch.moves()
        if self._stop is not None and self._stop.must_drop:
            problem = _STOPPING
        problem = self._first_problem(problem)
        self.interrupted = self.interrupted or problem == _STOPPING
        if problem:
            raise ClientError(problem)
        return losses

    def leave_if_interrupted(self) -> None:
        """Raise StopError on all ranks if a step of any was left. Collective over the world."""
        world = self.topology.world
        if world.comm.allreduce(self.interrupted, op=world.mpi.LOR):
            raise StopError(_STOPPING)

    def probing(self) -> None:
        """Dropout off."""
        self._deepspeed.eval()

    def training(self) -> None:
        """Dropout on."""
        self._deepspeed.train()

    def boundary(self, last: bool) -> None:
        """Whether the next backward is the last one before a step."""
        self._deepspeed.set_gradient_accumulation_boundary(last)

    def disturb(self, noise: torch.Tensor | None) -> None:
        """Add (layout.size,) to this rank's next gradient, once; None: nothing."""
        self._masters.disturb(None if noise is None else self._values.shaped(noise.float()))

    def agree(self, problem: str) -> None:
        """Raises ClientError on all ranks of the slot if one of them has a problem."""
        if problem := self._first_problem(problem):
            raise ClientError(problem)

    def mask(self, rows: Ids, tokens: Tokens) -> torch.Tensor:
        """(len(rows), positions): 1 where the hidden states of these rows are no padding."""
        inputs = self.head.inputs(tokens, rows, self.topology.device)
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        return nn.functional.pad(mask, (self.model.lead, 0), value=1)

    def _first_problem(self, problem: str) -> str:
        """What went wrong on the first rank of the slot where something did, or ""."""
        topology = self.topology
        if topology.ranks_per_client == 1:
            return problem
        if topology.slot.allreduce(not problem, op=topology.world.mpi.LAND):
            return ""
        return next(text for text in topology.slot.allgather(problem) if text)

    def discard(self, accumulated: bool) -> None:
        """Clear gradients that micro-steps left in the engine: finish the step with a zero loss,
        which spoils values and optimizer state until the next load."""
        if accumulated:
            discard(self._deepspeed, self.topology.device)

    def predict(
        self, batches: Sequence[Ids], tokens: Tokens
    ) -> tuple[npt.NDArray[np.float64], str]:
        """What the head tells of rows, see `hpcfed.engine.prediction.predict`."""
        self._deepspeed.eval()
        return predict(self._deepspeed, self.head, batches, tokens, self.topology, self.failures)

    def close(self) -> None:
        """Free the engine, and undo what ZeRO-3 leaves behind in the process."""
        self._deepspeed.destroy()
        nn.functional.linear = _LINEAR
