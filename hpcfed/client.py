"""One slot's DeepSpeed ZeRO engine: load a client's values, train, evaluate, read them back.

Writing param.data into a ZeRO engine is undone by the next step, because the fp32 master copy
wins; so `load` writes the master and the working copy, at every stage, and drops all optimizer
state. This is the only file that touches the engine.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from hpcfed.adapters.layout import AdapterLayout
from hpcfed.config import Local
from hpcfed.data.batches import Ids, Tokens, split_batch
from hpcfed.deepspeed_config import zero_stage
from hpcfed.model import Prepared
from hpcfed.topology import Topology

# ZeRO-3 replaces this function for good, by one that rounds differently: without putting it back,
# the next engine of the process would not have the bits it has in a process of its own.
_LINEAR = nn.functional.linear


class ClientError(Exception):
    """This client's update is lost; the federation goes on. All ranks of the slot raise it."""


@dataclass
class Trained:
    """What local training did: loss summed over samples, samples and optimizer steps."""

    loss_sum: float = 0.0
    samples: int = 0
    steps: int = 0


class Client:
    """The engine of one slot. Every method is collective over the ranks of the slot."""

    def __init__(
        self, prepared: Prepared, local: Local, settings: dict[str, Any], topology: Topology
    ) -> None:
        import deepspeed

        self.layout: AdapterLayout = prepared.adapted.layout
        self._parameters = prepared.adapted.parameters
        self._topology = topology
        self._local = local
        self._stage = zero_stage(settings)
        self._bf16 = bool(settings.get("bf16", {}).get("enabled"))
        optimizer: torch.optim.Optimizer
        if local.optimizer == "adamw":
            optimizer = torch.optim.AdamW(
                self._parameters, lr=local.lr, weight_decay=local.weight_decay
            )
        else:
            optimizer = torch.optim.SGD(
                self._parameters, lr=local.lr, weight_decay=local.weight_decay
            )
        self._engine, *_ = deepspeed.initialize(
            model=prepared.adapted.model,
            model_parameters=self._parameters,
            optimizer=optimizer,
            config=settings,
            dist_init_required=False,
        )

    @property
    def model(self) -> nn.Module:
        """The module inside the engine, for measuring; its values go through load and read."""
        module: nn.Module = self._engine.module
        return module

    def load(self, vector: torch.Tensor) -> None:
        """Make the trainable values equal `vector` (layout.size,) fp32 on the CPU, with no trace
        of an earlier client: master copy, working copy, and a fresh optimizer."""
        values = [
            vector[entry.values].reshape(entry.shape).to(self._topology.device)
            for entry in self.layout.entries
        ]
        if self._stage == 3:
            self._load_partitioned(values)
        else:
            self._load_replicated(values)
        base = getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)
        base.state.clear()

    def _load_replicated(self, values: list[torch.Tensor]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param

        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.data.copy_(value)
            if self._stage > 0:
                safe_set_full_fp32_param(parameter, value)

    def _load_partitioned(self, values: list[torch.Tensor]) -> None:
        import deepspeed
        from deepspeed.utils import safe_set_local_fp32_param

        rank, ranks = self._topology.rank_in_slot, self._topology.ranks_per_client
        for parameter, value in zip(self._parameters, values, strict=True):
            # Each rank holds ceil(n / ranks) values; the last one's partition may be padding.
            share = -(-value.numel() // ranks)
            padded = nn.functional.pad(value.flatten(), (0, share * ranks - value.numel()))
            safe_set_local_fp32_param(parameter, padded.narrow(0, share * rank, share))
        with deepspeed.zero.GatheredParameters(list(self._parameters), modifier_rank=0):
            for parameter, value in zip(self._parameters, values, strict=True):
                parameter.data.copy_(value)

    def read(self) -> torch.Tensor:
        """The trainable values (layout.size,) fp32 on the CPU, the same on all ranks of the slot;
        exact for fp32, and for bf16 exact in the fp32 master."""
        from deepspeed.utils import safe_get_full_fp32_param

        vector = torch.empty(self.layout.size, dtype=torch.float32)
        from_master = self._stage == 3 or self._bf16
        for entry, parameter in zip(self.layout.entries, self._parameters, strict=True):
            value = safe_get_full_fp32_param(parameter) if from_master else parameter.data
            vector[entry.values] = value.detach().flatten()[: entry.size].float().cpu()
        return vector

    def train(self, batches: Sequence[Ids], tokens: Tokens, dropout_seed: int) -> Trained:
        """One optimizer step per batch of row numbers; the mean loss of a batch is over its true
        number of samples, however they fall to ranks and micro-steps.

        Raises ClientError on all ranks of the slot if any rank fails outside a collective.
        """
        torch.manual_seed(dropout_seed)
        self._engine.train()
        result = Trained()
        for batch in batches:
            micro_steps = split_batch(
                batch, self._topology.ranks_per_client, self._local.micro_batch
            )
            for number, shares in enumerate(micro_steps):
                rows = shares[self._topology.rank_in_slot]
                last = number == len(micro_steps) - 1
                self._engine.set_gradient_accumulation_boundary(last)
                result.loss_sum += self._micro_step(rows, batch, tokens, number > 0)
            self._engine.step()
            result.samples += len(batch)
            result.steps += 1
        return result

    def _micro_step(self, rows: Ids, batch: Ids, tokens: Tokens, accumulated: bool) -> float:
        """Forward and backward; returns this rank's summed loss."""
        # A rank without rows still takes part in the collectives, with a sample of weight zero.
        filled = rows if len(rows) else batch[:1]
        problem = ""
        total = torch.zeros(())
        value = math.nan
        try:
            inputs = tokens.collate(filled, self._topology.device)
            labels = inputs.pop("labels")
            logits = self._engine(**inputs).logits.float()
            total = nn.functional.cross_entropy(logits, labels, reduction="sum")
            if not len(rows):
                total = total * 0.0
            value = total.item()
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        if not problem and not math.isfinite(value):
            problem = "the loss is not finite"
        problem = self._first_problem(problem)
        if problem:
            self._discard(accumulated)
            raise ClientError(problem)
        # DeepSpeed averages over the ranks: ranks / len(batch) makes it the mean over the batch.
        scale = self._topology.ranks_per_client / len(batch)
        self._engine.backward(total * scale, scale_wrt_gas=False)
        return value

    def _first_problem(self, problem: str) -> str:
        """What went wrong on the first rank of the slot where something did, or ""."""
        topology = self._topology
        if topology.ranks_per_client == 1:
            return problem
        if topology.slot.allreduce(not problem, op=topology.world.mpi.LAND):
            return ""
        return next(text for text in topology.slot.allgather(problem) if text)

    def _discard(self, accumulated: bool) -> None:
        """Clear gradients that micro-steps left in the engine: finish the step with a zero loss.
        Values and optimizer state are spoiled by it, and overwritten by the next load."""
        if not accumulated:
            return
        self._engine.set_gradient_accumulation_boundary(True)
        ids = torch.ones((1, 4), dtype=torch.int64, device=self._topology.device)
        zero = self._engine(input_ids=ids, attention_mask=ids).logits.float().sum() * 0.0
        self._engine.backward(zero, scale_wrt_gas=False)
        self._engine.step()

    @torch.no_grad()
    def predict(self, batches: Sequence[Ids], tokens: Tokens) -> npt.NDArray[np.float64]:
        """(2, len(tokens)): predicted class + 1 and loss of each row of `batches`, zero elsewhere.

        The ranks of the slot take the batches in turns; each returns its own rows only, so that
        the sum over ranks is the whole.
        """
        self._engine.eval()
        ranks, rank = self._topology.ranks_per_client, self._topology.rank_in_slot
        result = np.zeros((2, len(tokens)))
        for start in range(0, len(batches), ranks):
            mine = start + rank
            # Forward is collective under ZeRO-3: a rank without a batch repeats another's.
            rows = batches[mine if mine < len(batches) else start]
            inputs = tokens.collate(rows, self._topology.device)
            labels = inputs.pop("labels")
            logits = self._engine(**inputs).logits.float()
            if mine < len(batches):
                loss = nn.functional.cross_entropy(logits, labels, reduction="none")
                result[0, rows] = logits.argmax(-1).cpu().numpy() + 1
                result[1, rows] = loss.cpu().numpy()
        return result

    def close(self) -> None:
        """Free the engine, and undo what ZeRO-3 leaves behind in the process."""
        self._engine.destroy()
        nn.functional.linear = _LINEAR
