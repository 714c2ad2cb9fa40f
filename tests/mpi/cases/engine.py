"""Cases: what is written into a ZeRO engine is there, survives steps, and leaks nowhere."""

import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import deepspeed
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hpcfed
from hpcfed import model
from hpcfed.cluster.topology import Topology
from hpcfed.data.batches import Tokens
from hpcfed.data.wordings import Wording
from hpcfed.engine.engine import Engine
from hpcfed.errors import UserError
from hpcfed.objectives.heads import Classifier, Cloze, Head, LabelWords
from hpcfed.settings import deepspeed_config
from hpcfed.settings.config import Config, Local
from hpcfed.settings.resolve import resolve

HOUSE = str(Path(hpcfed.__file__).parent)
LABELS = ("a", "b", "c")  # an odd number: partitions of the head are uneven
_WORDING = Wording(("{a}", "<mask>"), LABELS)
HEADS: dict[str, Head] = {
    "classifier": Classifier(),
    "cloze": Cloze(_WORDING, (150, 160, 170)),
    "label_words": LabelWords(_WORDING, ((150,), (160, 161), (170, 150, 162))),
}


def check(topology: Topology, folder: Path, adapter: str, dtype: str, deepspeed: str) -> None:
    """Everything, for one kind of engine; one client of all ranks of the slot."""
    config = resolve(
        "lora-fedavg",
        [f"model.name={folder}", f"model.dtype={dtype}", f"deepspeed={deepspeed}",
         "adapter.rank=3", f"adapter.kind={adapter}", "adapter.virtual_tokens=3",
         f"cluster.ranks_per_client={topology.ranks_per_client}", "cluster.threads=1"],
    ).config  # fmt: skip
    check_values(config, topology)
    check_waits(config, topology)
    check_leaks(config, topology)
    check_corrections(config, topology)


def said_of(topology: Topology, folder: Path, settings: dict[str, Any]) -> str:
    """What is said of an engine with these settings over a JSON of ours."""
    words = [f"model.name={folder}", "deepspeed=ds_configs/zero2.json"]
    config = resolve("lora-fedavg", words).config
    complete = {**deepspeed_config.load(config), **settings}
    prepared = model.prepare(config, LABELS, 0, complete, HEADS["classifier"])
    try:
        Engine(prepared, config.local, complete, topology).close()
    except UserError as error:
        return str(error)
    return ""


def build(config: Config, local: Local, topology: Topology) -> Engine:
    """An engine with these local settings."""
    settings = deepspeed_config.load(replace(config, local=local))
    prepared = model.prepare(config, LABELS, 0, settings, HEADS[config.model.head])
    return Engine(prepared, local, settings, topology)


def some_tokens(rows: int = 20, longest: int = 9) -> Tokens:
    """Rows of random token ids, 3 to `longest` tokens long."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, longest + 1, rows)
    ids = rng.integers(100, 500, lengths.sum()).astype(np.int32)
    labels = rng.integers(0, len(LABELS), rows)
    gaps = np.random.default_rng(1).integers(0, lengths)
    return Tokens(ids, None, np.concatenate([[0], np.cumsum(lengths)]), labels, 0, gaps)


def check_values(config: Config, topology: Topology) -> None:
    """Written values read back exactly, before and after real steps with lr 0, and are the ones
    that the forward pass uses."""
    engine = build(config, replace(config.local, lr=0.0, optimizer="adamw"), topology)
    tokens = some_tokens()
    batches = [np.arange(0, 8), np.arange(8, 16), np.arange(16, 17)]
    for seed in (1, 2):
        torch.manual_seed(seed)
        vector = torch.randn(engine.layout.size) * 0.1
        engine.load(vector)
        assert torch.equal(engine.read(), vector), "read after write"
        check_working_copy(engine, vector, config)
        engine.train(batches, tokens, 0)
        assert torch.equal(engine.read(), vector), "a step with lr 0 changed the values"
        check_working_copy(engine, vector, config)
    engine.close()


def check_working_copy(engine: Engine, vector: torch.Tensor, config: Config) -> None:
    """The parameters that forward uses equal the written values in the working type."""
    dtype = torch.bfloat16 if config.model.dtype == "bf16" else torch.float32
    parameters = [p for p in engine.model.parameters() if p.requires_grad]
    with deepspeed.zero.GatheredParameters(parameters):
        total = sum(p.numel() for p in parameters)
        found = torch.cat([p.detach().flatten().float() for p in parameters]).sort().values
    assert total == engine.layout.size
    assert torch.equal(found, vector.to(dtype).float().sort().values), "the working copy is old"


class Reads(TorchDispatchMode):
    """Counts what has the host wait for the device, by the file that asks, torch's own left out."""

    def __init__(self) -> None:
        super().__init__()
        self.by_file = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            files = [frame.filename for frame in reversed(traceback.extract_stack()[:-1])]
            # Its count of steps is the host's own.
            if not any("/torch/optim/" in file for file in files):
                self.by_file[next(file for file in files if "/torch/" not in file)] += 1
        return func(*args, **(kwargs or {}))


def check_waits(config: Config, topology: Topology) -> None:
    """The host reads a number from the device once an update, whatever its steps, observed or not:
    what DeepSpeed reads for itself is not ours to spare, but in bf16 at stages 1 and 2. No operator
    is compiled, and at stage 0 no step of a single rank walks all modules for parameters."""
    assert deepspeed.comm.comm.cdb.shm_comm_op is None
    engine = build(config, config.local, topology)
    if engine.stage == 0 and topology.ranks_per_client == 1:
        vars(engine.model)["named_parameters"] = Mock(side_effect=AssertionError("walked"))
    tokens = some_tokens()
    batches = [np.arange(0, 8), np.arange(8, 16), np.arange(16, 17)]
    for observe in (False, True):
        for steps in (1, 3):
            engine.load(torch.zeros(engine.layout.size))
            with Reads() as reads:
                engine.train(batches[:steps], tokens, 0, observe)
            ours = {f: n for f, n in reads.by_file.items() if f.startswith(HOUSE)}
            assert sum(ours.values()) == 1, ours
            kind = type(engine._deepspeed.optimizer).__name__
            if config.model.dtype == "bf16" and kind == "DeepSpeedZeroOptimizer":
                theirs = {f: n for f, n in reads.by_file.items() if "/deepspeed/" in f}
                assert not theirs, theirs
    engine.close()


def check_leaks(config: Config, topology: Topology) -> None:
    """A client's result is the same bits whoever was trained in the engine before it, also if that
    one had frozen values; and those keep their bits."""
    local = replace(config.local, lr=1e-2, optimizer="adamw", weight_decay=0.1)
    engine = build(config, local, topology)
    tokens = some_tokens()
    first, second = [np.arange(0, 8), np.arange(8, 13)], [np.arange(10, 18)] * 3
    torch.manual_seed(3)
    one, two = torch.randn(2, engine.layout.size) * 0.1
    engine.load(one)
    engine.train(first, tokens, 0)
    wanted = engine.read()
    assert not torch.equal(wanted, one), "training moved nothing"
    trainable = torch.rand(engine.layout.size) < 0.5
    engine.load(two, trainable)
    engine.train(second, tokens, 1)
    found = engine.read()
    assert torch.equal(found[~trainable], two[~trainable]), "a frozen value moved"
    assert (found != two)[trainable].float().mean() > 0.9
    engine.predict([np.arange(20)], tokens)
    engine.load(one)
    engine.train(first, tokens, 0)
    assert torch.equal(engine.read(), wanted), "an earlier client left a trace"
    check_moments(engine, two)
    engine.close()


def check_corrections(config: Config, topology: Topology) -> None:
    """A control variate c moves the written values by -lr c more, whatever the working type; and
    SGD's momentum is kept like Adam's moments."""
    local = replace(config.local, optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=0.01)
    engine = build(config, local, topology)
    tokens, batch = some_tokens(), [np.arange(0, 8)]
    torch.manual_seed(4)
    vector, control = torch.randn(2, engine.layout.size) * 0.1
    found = []
    for own in (None, control):
        engine.load(vector, control=own)
        engine.train(batch, tokens, 0)  # the first step, in which momentum adds nothing
        found.append(engine.read())
    assert torch.allclose(found[1] - found[0], -0.1 * control, atol=1e-6)
    check_moments(engine, vector)
    engine.close()


def check_moments(engine: Engine, vector: torch.Tensor) -> None:
    """A round cut in two, its moments kept in between while another client trains, ends with the
    bits of the whole; without its moments it does not."""
    tokens = some_tokens()
    batches = [np.arange(0, 8), np.arange(8, 16), np.arange(16, 17)]
    engine.load(vector)
    engine.train([*batches, *batches], tokens, 0)
    wanted = engine.read()
    engine.load(vector)
    engine.train(batches, tokens, 0)
    half = engine.read()
    moments = engine.moments(len(batches))
    engine.load(vector * 2)
    engine.train(batches, tokens, 0)
    engine.load(half, moments=moments)
    engine.train(batches, tokens, 0)
    assert torch.equal(engine.read(), wanted), "moments were lost"
    engine.load(half)
    engine.train(batches, tokens, 0)
    assert not torch.equal(engine.read(), wanted)
