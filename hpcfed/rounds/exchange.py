"""From the clients' new values to the server's next ones.

new values -> update transforms -> what the server's rule adds -> weighted sums of the slot
  -> one exchange between slots -> update transforms -> the server's step
An aggregation rule other than the mean gets each client's LoRA factors besides.
"""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from hpcfed import registry
from hpcfed.cluster.collectives import MaskedSum, from_first, gather_clients
from hpcfed.policies.updates import Memo, Transform, Update, held
from hpcfed.round import Outcome, Round
from hpcfed.rounds.setup import Setup
from hpcfed.rounds.tally import Tally
from hpcfed.server.factors import Rule, Sent
from hpcfed.server.optimizer import Optimizer
from hpcfed.server.variates import Sampled
from hpcfed.state import CONTROL, UPDATES
from hpcfed.storage.states import ClientStates


class Exchange:
    """What stands between local training and the server's step, on all ranks."""

    def __init__(self, setup: Setup, states: dict[str, ClientStates]) -> None:
        """states: what clients keep, by kind."""
        config, layout = setup.config, setup.prepared.adapted.layout
        self._config, self._state, self._layout = config, setup.state, layout
        self._topology, self.guard = setup.topology, setup.guard
        self._rows = [len(rows.train) for rows in setup.rows]
        self._controls, self._memos = states[CONTROL], states[UPDATES]
        self.server = Optimizer(config, layout, setup.state.server)
        self.transforms: list[Transform] = [
            registry.UPDATES[name](config, layout) for name in config.updates.transforms
        ]
        self.rule: Rule = registry.AGGREGATIONS[config.aggregation.rule](config, layout)
        # The factors that this slot's clients send, packed.
        self._sent: dict[int, npt.NDArray[np.float32]] = {}
        self._moved: torch.Tensor | None = None  # what the rule has made of all of them
        self._lost = 0.0  # of the residual, see Rule.next
        self.noted: dict[str, float] = {}  # for the round's record
        self.masks = any(transform.masks for transform in self.transforms)
        self._remembers = any(transform.remembers for transform in self.transforms)

    def vectors(self, now: Round) -> int:
        """How many vectors (n,) each client adds to this round's exchange."""
        return 1 if now.warm else 1 + self.server.variates.sums

    def travelling(self, now: Round) -> int:
        """How many of them a client must really send, and get."""
        return 1 if now.warm else 1 + self.server.variates.travels

    def begin(self, now: Round, stats: int) -> MaskedSum:
        """The slot's empty sums. stats: numbers that travel with them."""
        self._sent, self._moved, self.noted = {}, None, {}
        extra = self.guard.extra if self.guard else 0 if now.warm else self.rule.extra
        return MaskedSum(
            now.shared.size * self.vectors(now) + extra,
            stats,
            per_value_weights=self.masks and not now.warm,
            wire=self._config.collective.wire,
        )

    def has(self, client: int, now: Round | None = None) -> torch.Tensor | None:
        """(layout.size,) bool: the values that a client has; None: all. now: None = between rounds
        of the method."""
        if not self.masks or (now is not None and now.warm):
            return None
        return held(self.transforms, client, self._memo(client))

    def sizes(self, client: int, now: Round) -> tuple[int, int]:
        """How many values of the shared part a client sends, all that it has, and how many it gets:
        some it may draw itself."""
        has = self.trains(client, now)
        size = now.shared.size if has is None else int(now.shared.pack(has).sum())
        if now.warm:
            return size, size
        got = (now.shared - self.rule.part).size if self.rule.draws else size
        return size + self.rule.extra, got

    def trains(self, client: int, now: Round) -> torch.Tensor | None:
        """(layout.size,) bool: the values that a client has, without those that the rule lets rest;
        None: all."""
        has = self.has(client, now)
        rests = None if now.warm else self.rule.rests(self._state.values, now.number)
        if rests is None:
            return has
        return ~rests if has is None else has & ~rests

    def _memo(self, client: int) -> Memo:
        return (self._memos.load(client) if self._remembers else None) or {}

    def correction(self, client: int, now: Round) -> torch.Tensor | None:
        """(layout.size,), added to a client's gradients; None: nothing."""
        if now.warm:
            return None
        return self.server.variates.correction(now.shared, self._variate(client, now))

    def _variate(self, client: int, now: Round) -> torch.Tensor | None:
        if now.warm or not self.server.variates.keeps:
            return None
        tensors = self._controls.load(client)
        return None if tensors is None else tensors["control"]

    def add(self, client: int, now: Round, outcome: Outcome, sums: MaskedSum) -> Outcome:
        """Add what a client sends to the slot's sums; its outcome, failed if that is not finite."""
        assert outcome.values is not None
        shared = now.shared
        before, values = shared.pack(self._state.values), shared.pack(outcome.values)
        update = Update(client, before, values, self._rows[client])
        control = None
        sent: list[torch.Tensor] = []
        if not now.warm:
            update.memo = self._memo(client)
            for transform in self.transforms:
                transform.on_client(update, now)
            sent, control = self.server.message(
                shared, self._state.values, outcome, self._variate(client, now), update.weight
            )
        mask = None
        if sums.per_value_weights:
            own = torch.ones_like(before, dtype=torch.bool) if update.mask is None else update.mask
            mask = own.repeat(1 + len(sent)).numpy()
        if self.rule.senses and not now.warm:
            assert outcome.importance is not None
            sent = [*sent, self.rule.report(outcome.importance)]
        message, weight = torch.cat([update.values, *sent]), update.weight
        if self.guard is not None:
            message, weight = self.guard.message(message.double() - before.double()), 1
        if not sums.add(message, weight, mask):
            return replace(
                outcome, values=None, loss_sum=0.0, reason="what it would send is not finite"
            )
        if self.rule.gathers and not now.warm:
            vector = torch.zeros(self._layout.size)
            shared.unpack(update.values, vector)
            self._sent[client] = self.rule.part.pack(vector).numpy()
        if self._topology.leads_slot:
            if control is not None:
                self._controls.save(client, now.number, {"control": control})
            if self._remembers and not now.warm:
                self._memos.save(client, now.number, update.memo)
        return outcome

    def mean(
        self, now: Round, sums: MaskedSum
    ) -> tuple[torch.Tensor, npt.NDArray[np.float64], int]:
        """Exchange: the mean of what clients sent, the statistics, and the bytes on the wire.
        Collective over all ranks."""
        if self.guard is not None:
            self.guard.close(sums, now.number)
        before = now.shared.pack(self._state.values)
        padding = (0, sums.size - len(before))
        mean = sums.mean(torch.nn.functional.pad(before, padding), self._topology)
        wire, values = mean.wire_bytes, mean.values
        if self.rule.settles and not now.warm:
            values, told = torch.split(values, [len(values) - self.rule.extra, self.rule.extra])
            wire += self._settle(now, values, told)
        return values, mean.stats, wire

    def _settle(self, now: Round, mean: torch.Tensor, told: torch.Tensor) -> int:
        """Let the rule act, on the first rank, for all; the bytes on the wire."""
        found: dict[int, npt.NDArray[np.float32]] = {}
        wire = 0
        if self.rule.gathers:
            found, wire = gather_clients(self._sent, self.rule.part.size, self._topology)
        moves = self.rule.part | self._layout.residual
        moved = np.zeros(moves.size + 1)
        if found or (self._topology.is_root and not self.rule.gathers):
            values = self._state.values.clone()
            now.shared.unpack(mean, values)
            sent = [Sent(self._rows[k], torch.from_numpy(row)) for k, row in found.items()]
            values, lost = self.rule.next(values, sent, now, told)
            moved[:-1], moved[-1] = moves.pack(values).numpy(), lost
        result = moved.astype(np.float32)
        wire += from_first(result, self._topology)
        self._moved, self._lost = torch.from_numpy(result[:-1]), float(result[-1])
        return wire

    def step(self, now: Round, mean: torch.Tensor, tally: Tally) -> None:
        """The server's step, into the run's state."""
        state, shared = self._state, now.shared
        before = shared.pack(state.values)
        if self.guard is not None:
            mean = before + self.guard.open(mean)
        if now.warm:
            after = mean
        else:
            for transform in self.transforms:
                mean = transform.on_mean(mean, before, now)
            after = self.server.step(shared, state.values, mean, self._sampled(tally))
        state.values = state.values.clone()
        shared.unpack(after, state.values)
        if self._moved is not None:
            (self.rule.part | self._layout.residual).unpack(self._moved, state.values)
            self.noted = self.rule.note(state.values, self._lost)
        state.rounds = now.number + 1

    def _sampled(self, tally: Tally) -> Sampled:
        succeeded = tally.succeeded
        weight = sum(self._rows[k] for k in succeeded)  # transforms that change it have no variates
        steps = int(tally.total("steps"))
        # With privacy the step is made also if nobody sent anything, on noise alone.
        clients = len(succeeded) if self.guard is None else self._config.federation.per_round
        return Sampled(clients, weight, steps, len(self._rows), sum(self._rows))

    def accept(self, now: Round, clients: list[int]) -> None:
        """What these clients' variates and memos were saved as is current from now on."""
        if now.warm:
            return
        if self.server.variates.keeps:
            self._controls.accept(now.number, clients)
        if self._remembers:
            self._memos.accept(now.number, clients)
