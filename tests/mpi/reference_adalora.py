"""AdaLoRA in a federation as one plain PyTorch loop on PEFT's own AdaLoRA layers: the penalty as a
term of the loss, importance from param.grad, one client after the other.

It shares with hpcfed what the comparison holds fixed (rows, batches, initial values, who is
sampled) and nothing of what it checks: modules, penalty, masters, exchange, budget.
"""

from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from hpcfed.adapters.layout import AdapterLayout
from hpcfed.data.batches import form_batches
from hpcfed.policies.sampling import sample
from hpcfed.rng import generator
from hpcfed.settings.config import Config
from tests.mpi.reference import begin
from tests.mpi.slow import obvious_losses

BETA = 0.85


@dataclass
class Outcome:
    """What a loop came to: values (size,), and the singular values that were left after each
    round."""

    layout: AdapterLayout
    initial: torch.Tensor
    values: torch.Tensor
    left: list[int]


class Loop:
    """`run` gives what the method came to."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.rows, self.head, self.tokens, prepared = begin(config)
        self.layout, self.initial = prepared.adapted.layout, prepared.initial
        labels = next(entry for entry in self.layout.entries if entry.role == "bias").size
        base = AutoModelForSequenceClassification.from_pretrained(
            config.model.name, num_labels=labels
        )
        missing = base.load_state_dict(prepared.fresh, strict=False)
        assert not missing.unexpected_keys
        adapter = config.adapter
        spec = peft.AdaLoraConfig(
            init_r=adapter.rank, target_r=adapter.rank, lora_alpha=adapter.alpha, total_step=1,
            target_modules=["query", "value"],
        )  # fmt: skip
        self.network: Any = peft.get_peft_model(base, spec).eval()  # no dropout
        named = dict(self.network.named_parameters())
        self.parameters: list[nn.Parameter] = []
        for entry in self.layout.entries:
            name = entry.name if entry.name in named else f"{entry.name}.default"
            self.parameters.append(named[name].requires_grad_(True))
        self.matrices = [e.name.removesuffix("lora_E") for e in self.layout.entries
                         if "lora_E" in e.name]  # fmt: skip

    def part(self, vector: torch.Tensor, name: str) -> torch.Tensor:
        """A view of an entry's values."""
        (entry,) = [own for own in self.layout.entries if own.name == name]
        return vector[entry.values].view(entry.shape)

    def penalty(self) -> torch.Tensor:
        """As AdaLoraModel.forward has it."""
        found = []
        for name, p in self.network.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                gram = p @ p.T if "lora_A" in name else p.T @ p
                found.append(torch.norm(gram - torch.eye(len(gram)), p="fro"))
        return self.config.adapter.orthogonality * sum(found) / len(found)

    def client(
        self, k: int, number: int, start: torch.Tensor, still: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A client's values after a round, and how much each mattered."""
        local = self.config.local
        parts = list(zip(self.parameters, self.layout.entries, strict=True))
        with torch.no_grad():
            for p, entry in parts:
                p.copy_(start[entry.values].view(entry.shape))
        optimizer = torch.optim.SGD(self.parameters, lr=local.lr)
        smooth, unsure, steps = torch.zeros_like(start), torch.zeros_like(start), 0
        for epoch in range(local.epochs):
            rng = generator(self.config.seed, "batches", number, k, epoch)
            for batch in form_batches(
                self.rows[k].train, self.tokens.lengths, local.batch_size, rng
            ):
                losses = obvious_losses(
                    lambda **inputs: self.network.base_model.model(**inputs).logits,
                    self.head, batch, self.tokens,
                )  # fmt: skip
                optimizer.zero_grad()
                (losses.mean() + self.penalty()).backward()
                for p, entry in parts:
                    assert p.grad is not None
                    p.grad[still[entry.values].view(entry.shape)] = 0
                nn.utils.clip_grad_norm_(self.parameters, local.clip)
                moved = torch.cat(
                    [torch.abs(p.detach() * p.grad).flatten() for p in self.parameters
                     if p.grad is not None]
                )  # fmt: skip
                smooth = BETA * smooth + (1 - BETA) * moved
                unsure = BETA * unsure + (1 - BETA) * (moved - smooth).abs()
                steps += 1
                optimizer.step()
        after = torch.cat([p.detach().flatten().clone() for p in self.parameters])
        return after, smooth * unsure / (1 - BETA**steps) ** 2

    def run(self) -> Outcome:
        """All rounds."""
        config, spec, left = self.config, self.config.aggregation, []
        rounds, rank = config.federation.rounds, config.adapter.rank
        values, begins, ends = self.initial, spec.prune_from * rounds, spec.prune_to * rounds
        for number in range(rounds):
            still = torch.zeros(len(values), dtype=torch.bool)
            if number >= ends:
                for name in self.matrices:
                    gone = self.part(values, f"{name}lora_E")[:, 0] == 0
                    self.part(still, f"{name}lora_E")[gone] = True
                    self.part(still, f"{name}lora_A")[gone] = True
                    self.part(still, f"{name}lora_B")[:, gone] = True
            sampled = sample(config.seed, number, len(self.rows), config.federation.per_round)
            n = {k: len(self.rows[k].train) for k in sampled}
            found = {k: self.client(k, number, values, still) for k in sampled}
            mean, matter = (
                sum(n[k] * found[k][i].double() for k in sampled) / sum(n.values()) for i in (0, 1)
            )
            assert isinstance(mean, torch.Tensor) and isinstance(matter, torch.Tensor)
            values, scores = mean.float(), []
            for name in self.matrices:
                e, p, q = (self.part(matter, f"{name}lora_{own}") for own in "EBA")
                for i in range(rank):
                    score = e[i, 0] + p[:, i].mean() + q[i].mean()
                    scores.append((float(score), name, i))
            whole = rank * len(self.matrices)
            least = round(spec.budget * len(self.matrices))
            share = min(1.0, max(0.0, (ends - number - 1) / (ends - begins)))
            budget = least + round((whole - least) * share**3)
            for _, name, i in sorted(scores, reverse=True)[budget:]:
                self.part(values, f"{name}lora_E")[i] = 0
            left.append(budget)
        return Outcome(self.layout, self.initial, values, left)
