"""From a checked configuration to a run that is ready for its next round."""

import socket
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from hpcfed import fitting, model
from hpcfed.cluster.stop import Stop
from hpcfed.cluster.topology import (
    Topology,
    World,
    connect_slots,
    job,
    keep_heap_small,
    restarted,
)
from hpcfed.data import partition
from hpcfed.data.batches import Tokens
from hpcfed.data.partition import ClientRows
from hpcfed.data.sources import TaskData
from hpcfed.engine.engine import Engine
from hpcfed.errors import UserError
from hpcfed.model import Prepared
from hpcfed.objectives import heads
from hpcfed.privacy.streams import public_key
from hpcfed.rounds import guard as privacy
from hpcfed.rounds import ledger as by_row
from hpcfed.rounds import origin
from hpcfed.rounds.preflight import Checked, check_rounds
from hpcfed.rounds.progress import Opening
from hpcfed.rounds.trial import try_step
from hpcfed.settings import deepspeed_config, plugins
from hpcfed.settings.config import Config
from hpcfed.settings.counts import PRIVATE
from hpcfed.settings.deepspeed_config import zero_stage
from hpcfed.state import RunState, ServerState
from hpcfed.storage.run import RunDirectory

LOCK_PATIENCE = 120.0  # seconds


@dataclass(frozen=True)
class Setup:
    """All that a run needs besides its state, and the state that it goes on from.

    started: when this life of the run began, of time.monotonic. init_seconds: until it was ready.
    earlier_seconds: of earlier lives.
    """

    config: Config
    task: TaskData
    rows: list[ClientRows]
    cuts: fitting.Cuts
    test_tokens: Tokens
    prepared: Prepared
    engine: Engine
    topology: Topology
    stop: Stop
    directory: RunDirectory
    state: RunState
    started: float
    init_seconds: float
    earlier_seconds: float
    guard: privacy.Guard | None = None  # with privacy of clients
    ledger: by_row.Ledger | None = None  # with privacy of rows

    @property
    def rounds(self) -> int:
        """After which the run ends: federation.rounds, or fewer, if a budget of privacy does not
        allow so many."""
        return self.config.federation.rounds if self.privacy is None else self.privacy.rounds

    @property
    def privacy(self) -> privacy.Guard | by_row.Ledger | None:
        """What accounts for privacy, if there is any."""
        return self.guard or self.ledger

    @property
    def train_tokens(self) -> Tokens:
        """Of the training split, texts as long as task.max_length lets them be."""
        return self.cuts.whole

    def opening(self) -> Opening:
        """What a person is told at the start."""
        config, topology = self.config, self.topology
        early = self.privacy.ends_early if self.privacy else ""
        return Opening(
            what=f"{config.method} on {config.task.name}",
            training_rows=len(self.task.train),
            clients=len(self.rows),
            per_round=min(config.federation.per_round, len(self.rows)),
            rounds=self.rounds,
            model=config.model.name,
            frozen=self.prepared.backbone_values,
            trainable=self.prepared.adapted.layout.trained.size,
            ranks=topology.world.size,
            slots=topology.slots,
            threads=topology.threads,
            device=str(topology.device),
            seconds=self.init_seconds,
            folder=self.directory.path,
            done=self.state.rounds,
            up=self.state.totals.up,
            notes=tuple(filter(None, (self.prepared.rounded, *self.prepared.notes, early))),
        )


def set_up(
    checked: Checked,
    world: World,
    started: float,
    topology: Topology | None = None,
    stop: Stop | None = None,
) -> Setup:
    """Load everything; nothing is written before all of it succeeded. A run that has begun goes on
    from its last commit.

    topology: of callers that watch what is communicated. stop: if it listens to signals already.
    Raises UserError, on all ranks, for anything the user can mend.
    """
    directory = RunDirectory(checked.output)
    try:
        return _set_up(checked, world, started, directory, topology, stop)
    except BaseException:
        directory.close()
        raise


def _set_up(
    checked: Checked,
    world: World,
    started: float,
    directory: RunDirectory,
    topology: Topology | None,
    stop: Stop | None,
) -> Setup:
    config, settings, task = checked.config, checked.settings, checked.task
    state: RunState | None = None
    key: bytes | None = None  # with privacy, on the first rank
    began = origin.of_input(checked)
    with world.agreement("opening the run directory"):
        if checked.begun and world.rank == 0:
            # The earlier life of a requeued job may take a moment to end.
            state = directory.reopen(job(), LOCK_PATIENCE if restarted() else 0.0)
            origin.compare(directory.began, began, checked.output)
            check_rounds(config, directory.planned, checked.output)
            if state.privacy is not None:
                secret = config.privacy.secret
                key = directory.read_key() if secret else public_key(config.seed)
                privacy.check_key(state.privacy, key)
    stop = stop or Stop(config.cluster.grace_seconds)
    topology = _connect(checked, world, topology)
    cuts, test_tokens, prepared = _load(checked, world)
    train_tokens = cuts.whole
    began = replace(
        began,
        tokens=origin.of_tokens(train_tokens, test_tokens),
        model=origin.of_model(prepared, topology),
    )
    origin.agree(world.comm.allgather(began))
    with world.agreement("comparing with what the run began with"):
        if checked.begun and world.rank == 0:
            origin.compare(directory.began, began, checked.output)
            directory.check_layout(prepared.adapted.layout)
    engine = Engine(prepared, config.local, settings, topology, stop)
    try:
        try_step(config, engine, prepared.initial, train_tokens, test_tokens)
    except BaseException:
        engine.close()
        raise
    init_seconds = time.monotonic() - started
    state = world.comm.bcast(state, root=0) if checked.begun else _first_state(config, prepared)
    assert state is not None
    with world.agreement("accounting for privacy"):
        if PRIVATE.holds(config) and not checked.begun and world.rank == 0:
            state.privacy, key = privacy.begin(config, checked.rows)
    state.privacy = world.comm.bcast(state.privacy)
    earlier_seconds = state.seconds.total
    state.seconds.init += init_seconds
    stop.tail = state.seconds.tail
    facts, here = _facts(config, task, prepared, settings), _here(topology, state.rounds)
    everyone = world.comm.allgather(facts.get("plugins"))
    if any(own != everyone[0] for own in everyone):
        raise UserError("The plug-ins differ from host to host; give all hosts the same files.")
    with world.agreement("writing the run directory"):
        if world.rank == 0 and checked.begun:
            if directory.damage is not None:
                print(
                    f"hpcfed: {directory.damage}; the run goes on from the commit before, of round "
                    f"{state.rounds}.",
                    file=sys.stderr,
                    flush=True,
                )
            directory.go_on(checked.resolved, facts, here)
        elif world.rank == 0:
            table = partition.summary(task, checked.rows)
            state.seconds.total = time.monotonic() - started
            hidden = key if config.privacy.secret else None
            directory.create(checked.resolved, facts, here, table, state, began, job(), hidden)
    directory.clients.run = world.comm.bcast(directory.clients.run)
    return Setup(
        config, task, checked.rows, cuts, test_tokens, prepared, engine, topology, stop,
        directory, state, started, init_seconds, earlier_seconds,
        privacy.build(config, len(checked.rows), topology, state.privacy, key),
        by_row.build(config, checked.rows, topology, state.privacy, key),
    )  # fmt: skip


def try_out(checked: Checked, world: World) -> tuple[str, tuple[str, ...]]:
    """The trial step that a run begins with, and no run: what came through, in words, and what a
    person should know of the model. Raises UserError as `set_up` does."""
    config = checked.config
    topology = _connect(checked, world)
    cuts, test_tokens, prepared = _load(checked, world)
    engine = Engine(prepared, config.local, checked.settings, topology)
    try:
        try_step(config, engine, prepared.initial, cuts.whole, test_tokens)
    finally:
        engine.close()
    lengths, inner = cuts.whole.lengths, prepared.adapted.network.inner
    ranks = topology.ranks_per_client
    return (
        f"{type(inner).__name__} with adapter.kind={config.adapter.kind} and model.head="
        f"{config.model.head}, at ZeRO-{engine.stage} on {ranks} rank{'s'[: ranks > 1]} a client: "
        f"rows of {lengths.min()} and {lengths.max()} tokens"
    ), prepared.notes


def _connect(checked: Checked, world: World, topology: Topology | None = None) -> Topology:
    """The slots of the world, if they are not given, and what their memory needs."""
    topology = topology or connect_slots(world, checked.config.cluster)
    if zero_stage(checked.settings) == 3 and topology.device.type == "cpu":
        keep_heap_small()
    return topology


def _load(checked: Checked, world: World) -> tuple[fitting.Cuts, Tokens, Prepared]:
    """Training and test rows as token ids, and the adapted model. Collective over the world."""
    config, settings, task = checked.config, checked.settings, checked.task
    with world.agreement("checking the DeepSpeed configuration"):
        deepspeed_config.verify(settings)
    with world.agreement("reading the tokenizer"):
        tokenizer = model.load_tokenizer(config)
        head = heads.build(config, task, tokenizer)
        train_tokens, test_tokens = fitting.encode(head, (task.train, task.test), tokenizer, config)
        cuts = fitting.Cuts(train_tokens, head, task.train, tokenizer, config)
    with world.agreement("loading the model"):
        prepared = model.prepare(config, task.labels, train_tokens.pad_id, settings, head)
        said = fitting.shortened((train_tokens, test_tokens), config)
        prepared = replace(prepared, notes=(*prepared.notes, *said))
        backbone = prepared.adapted.network.backbone
        fitting.check_ids(backbone, (train_tokens, test_tokens), tokenizer, config.model.name)
    return cuts, test_tokens, prepared


def _first_state(config: Config, prepared: Prepared) -> RunState:
    """Before the first round: everyone has the initial values, and shares all of them."""
    layout = prepared.adapted.layout
    return RunState(prepared.initial.clone(), layout.blocks, ServerState(config.server.lr))


def _facts(
    config: Config, task: TaskData, prepared: Prepared, settings: dict[str, Any]
) -> dict[str, Any]:
    """What runs."""
    layout = prepared.adapted.layout
    own = {"plugins": plugins.digests(config.plugins)} if config.plugins else {}
    return {
        **own,
        "model": prepared.source,
        "labels": list(task.labels),
        "backbone_values": prepared.backbone_values,
        "adapter_values": {block: layout.part([block]).size for block in layout.blocks},
        "deepspeed": settings,
    }


def _here(topology: Topology, rounds_done: int) -> dict[str, Any]:
    """Where this life of the run takes place."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "rounds_done": rounds_done,
        "hosts": dict(Counter(topology.world.comm.allgather(socket.gethostname()))),
        "ranks": topology.world.size,
        "slots": topology.slots,
        "threads": topology.threads,
        "device": str(topology.device),
    }
