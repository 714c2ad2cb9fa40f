"""`hpcfed plan`: what a run would take, before an hour of a GPU is spent.

Nothing is loaded: the model is built of tensors that have shapes but no values, and one forward
pass of it shows what autograd would keep.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hpcfed import fitting, model, quantized, registry
from hpcfed.adapters.base import Adapted, text_config
from hpcfed.adapters.layout import HEAD
from hpcfed.app import plan_privacy
from hpcfed.cluster.topology import check_hosts
from hpcfed.data import partition, sources
from hpcfed.data.batches import padding
from hpcfed.data.partition import ClientRows
from hpcfed.errors import UserError
from hpcfed.objectives import heads
from hpcfed.policies import layers, sampling
from hpcfed.policies.sharing import Sharing
from hpcfed.privacy import options as privacy
from hpcfed.rounds import preflight
from hpcfed.rounds.account import FP32_BYTES
from hpcfed.server.variates import configured
from hpcfed.settings import deepspeed_config
from hpcfed.settings.config import Config
from hpcfed.settings.counts import BY_CLIENT, PRIVATE, SYNCED, VIRTUAL
from hpcfed.settings.resolve import Resolved

GB = 1e9
STAGES = ("zero0", "zero1", "zero2", "zero3")
# Optimizer tensors a value: AdamW's two moments; SGD has its momentum or none.
_MOMENTS = {"adamw": 2, "adam": 2, "sgd": 1}
ROUNDS_SHOWN = 2
# Measured peaks were up to a tenth above the estimate (benchmarks/README.md).
MARGIN = 1.1


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at one ZeRO stage."""

    backbone: float  # held all the time
    gathered: float  # ZeRO-3: what is whole for a moment
    adapter: float  # working copy, gradients, fp32 master
    optimizer: float
    activations: float  # kept for backward, and the largest that is made on the way

    @property
    def total(self) -> float:
        """The peak in a step."""
        return sum(dataclasses.astuple(self))


def plan(resolved: Resolved, nodes: int, gpus: int, gigabytes: float) -> Iterator[str]:
    """The plan, line by line. gigabytes: memory of a GPU.

    Raises UserError as `hpcfed run` would.
    """
    config = resolved.config
    ranks, per_client = nodes * gpus, config.cluster.ranks_per_client
    if not 0 < gigabytes < float("inf"):
        raise UserError(f"--memory is {gigabytes:g}; it must be above 0, in GB.")
    preflight.check_options(resolved, ranks)
    check_hosts({"a node": gpus}, per_client)
    settings = deepspeed_config.load(config)
    quantized.check(config, settings)
    task = sources.load(config)
    rows = partition.partition(task, config)
    privacy.check_clients(config, [len(own.train) for own in rows])
    tokenizer = model.load_tokenizer(config)
    head = heads.build(config, task, tokenizer)
    tokens, test = fitting.encode(head, (task.train, task.test), tokenizer, config)
    cuts = fitting.Cuts(tokens, head, task.train, tokenizer, config)
    adapted = model.outline(config, task.labels, tokens.pad_id)
    fitting.check_ids(adapted.network.backbone, (tokens, test), tokenizer, config.model.name)
    activations, traced = activation_bytes(adapted, micro_batch(config), config.task.max_length)
    if config.model.gradient_checkpointing:  # backward makes one block after the other again
        off = dataclasses.replace(config.model, gradient_checkpointing=False)
        whole = model.outline(dataclasses.replace(config, model=off), task.labels, tokens.pad_id)
        everything, _ = activation_bytes(whole, micro_batch(config), config.task.max_length)
        activations += everything / len(adapted.blocks)
    cache = cache_bytes(config, adapted)
    activations = max(activations, cache)  # answers are written when nothing is trained
    slots = ranks // per_client
    yield (
        f"{config.method} on {config.task.name}: {len(rows)} clients, "
        f"{min(config.federation.per_round, len(rows))} a round, {config.federation.rounds} rounds"
    )
    yield (
        f"{nodes} node{'s'[: nodes > 1]} x {gpus} = {ranks} ranks = {slots} "
        f"slot{'s'[: slots > 1]} x {per_client}"
    )
    yield ""
    yield from _memory_lines(config, settings, adapted, activations, gigabytes)
    if cache:
        yield (
            f"  (while answers are written, {config.evaluation.batch_size} at a time, keys and "
            f"values take {cache / GB:.2f} GB: evaluation.batch_size)"
        )
    yield from (f"  ({said})" for said in fitting.shortened((tokens, test), config))
    if not traced:
        yield "  (activations by the sizes of the weights: this model's forward cannot be followed)"
    yield ""
    yield from _traffic_lines(config, adapted, slots)
    yield ""
    trained, spec = [own.train for own in rows], config.local
    shape = spec.batch_size, config.cluster.ranks_per_client, spec.micro_batch
    grouped, drawn = padding(trained, tokens.lengths, *shape, config.seed)
    yield (
        f"padding is {grouped:.1%} of what a forward reads, of batches whose rows are about as long"
        f" ({drawn:.1%} if they were drawn at random)"
    )
    if PRIVATE.holds(config):
        yield from plan_privacy.lines(config, rows)
    if not BY_CLIENT.holds(config):
        yield from _lane_lines(config, rows, cuts, slots)


def _memory_lines(
    config: Config, settings: dict[str, Any], adapted: Adapted, activations: float, gigabytes: float
) -> Iterator[str]:
    micro, length = micro_batch(config), config.task.max_length
    yield f"memory of a rank in GB, {micro} texts of {length} tokens in a forward:"
    yield (
        f"  {'stage':<6}{'backbone':>10}{'gathered':>10}{'adapter':>9}{'optimizer':>11}"
        f"{'activations':>13}{'total':>8}"
    )
    configured = deepspeed_config.zero_stage(settings)
    fits = []
    for stage in range(len(STAGES)):
        need = memory(config, adapted, stage, settings, activations)
        cells = "".join(
            f"{part / GB:>{width}.2f}"
            for part, width in zip(dataclasses.astuple(need), (10, 10, 9, 11, 13), strict=True)
        )
        verdict = "does not fit"
        if config.model.dtype == "bf16" and stage == 0:
            verdict = "not with bf16"
        elif config.model.quantize != "none" and stage == 3:
            verdict = f"not with {config.model.quantize}"
        elif need.total * MARGIN <= gigabytes * GB:
            fits.append(stage)
            verdict = "fits"
        mark = f"  <- {config.deepspeed}" if stage == configured else ""
        yield f"  {STAGES[stage]:<6}{cells}{need.total / GB:>8.2f}  {verdict}{mark}"
    yield f"  (a GPU of {gigabytes:g} GB; CUDA's own 0.5 to 1 GB is not in it)"
    if any(f"offload_{what}" in settings["zero_optimization"] for what in ("param", "optimizer")):
        yield f"  {config.deepspeed} keeps on the host what it offloads; the table does not"
        return
    if configured in fits:
        return
    if fits:
        yield f"  {config.deepspeed} does not fit: use deepspeed=ds_configs/{STAGES[fits[0]]}.json"
    else:
        yield (
            "  nothing fits: raise cluster.ranks_per_client with ds_configs/zero3.json, lower "
            "local.micro_batch, set model.gradient_checkpointing=true, or use "
            "ds_configs/offload.json"
        )


def micro_batch(config: Config) -> int:
    """Rows of a rank's forward pass."""
    whole = -(-config.local.batch_size // config.cluster.ranks_per_client)
    return min(whole, config.local.micro_batch or whole)


def memory(
    config: Config, adapted: Adapted, stage: int, settings: dict[str, Any], activations: float
) -> Memory:
    """What a rank needs at a ZeRO stage. activations: bytes, see `activation_bytes`."""
    ranks = config.cluster.ranks_per_client
    width = 2 if config.model.dtype == "bf16" else 4
    trained = adapted.layout.trained.size
    frozen = sum(p.numel() for p in adapted.network.parameters()) - trained
    # ZeRO-3 makes whole what a module needs, and what it may keep live in between.
    gathered = 0.0
    if stage == 3:
        if deepspeed_config.zero_stage(settings) != 3:
            settings = json.loads(deepspeed_config.locate("ds_configs/zero3.json").read_text())
        zero = settings.get("zero_optimization", {})
        largest = max(p.numel() for p in adapted.network.parameters())
        live = max(largest, min(int(zero.get("stage3_max_live_parameters", 1e9)), frozen))
        gathered = float(live * width)
    held = frozen * width / (ranks if stage == 3 else 1)
    if config.model.quantize != "none":
        packed = quantized.packed(adapted.blocks)
        held = (frozen - packed) * width + packed * quantized.BITS / 8
    master = 4 * trained / (ranks if stage else 1) if stage or width == 2 else 0
    copies = 2 * width * trained
    moments = _MOMENTS[config.local.optimizer] * 4 * trained / (ranks if stage else 1)
    return Memory(held, gathered, copies + master, moments, activations)


def cache_bytes(config: Config, adapted: Adapted) -> float:
    """Bytes of the keys and values that are kept while a batch of answers is written, each as long
    as it may be; 0 where none are written. Of every layer, also one that keeps a window only."""
    longest = config.evaluation.max_new_tokens
    if not longest:
        return 0.0
    own = text_config(adapted.network.inner)
    heads = own.num_attention_heads
    kept = getattr(own, "num_key_value_heads", None) or heads
    size = getattr(own, "head_dim", None) or own.hidden_size // heads
    virtual = config.adapter.virtual_tokens if config.adapter.kind in VIRTUAL else 0
    tokens = config.evaluation.batch_size * (config.task.max_length + virtual + longest)
    width = 2 if config.model.dtype == "bf16" else 4
    return float(2 * own.num_hidden_layers * kept * size * tokens * width)


def activation_bytes(adapted: Adapted, rows: int, length: int) -> tuple[float, bool]:
    """Bytes that autograd keeps of one forward of so many rows of so many tokens, and twice the
    largest of them, for what is made on the way; and whether the forward could be followed.

    It cannot where it depends on values: which expert a token goes to, where a text ends. Then
    sizes of weights tell: `_by_weights`.
    """
    try:
        return _traced(adapted, rows, length), True
    except UserError:
        raise
    except Exception:  # fake tensors fail in many ways
        return _by_weights(adapted, rows, length), False


def _by_weights(adapted: Adapted, rows: int, length: int) -> float:
    """About what `_traced` gives: for each weight matrix of a block what goes in and what comes
    out, of experts those that a token is sent to; and attention's weights, one map a head."""
    kept = 0
    for block in adapted.blocks:
        config = next((m.config for m in block.modules() if hasattr(m, "config")), None)
        routed = getattr(config, "num_experts_per_tok", None) or 1
        heads = getattr(config, "num_attention_heads", 1)
        for name, parameter in block.named_parameters():
            if parameter.ndim > 1 and "lora_" not in name:
                every = parameter.shape[-2] + parameter.shape[-1]
                kept += every * (routed if parameter.ndim > 2 else 1)
        kept += heads * length
    width = next(adapted.network.parameters()).element_size()
    return float(kept * rows * length * width)


def _traced(adapted: Adapted, rows: int, length: int) -> float:
    network = adapted.network.train()
    sizes: dict[int, int] = {}
    with FakeTensorMode():
        held = {
            name: torch.empty(value.shape, dtype=value.dtype, requires_grad=value.requires_grad)
            for name, value in itertools.chain(network.named_parameters(), network.named_buffers())
        }
        weights = {value.untyped_storage()._cdata for value in held.values()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                sizes[storage._cdata] = storage.nbytes()
            return tensor

        ids = torch.ones((rows, length), dtype=torch.int64)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            # The result keeps what was saved alive, and so the storages apart, until here.
            result = torch.func.functional_call(network, held, kwargs=inputs)
        del result
    return float(sum(sizes.values()) + 2 * max(sizes.values(), default=0))


def _traffic_lines(config: Config, adapted: Adapted, slots: int) -> Iterator[str]:
    layout, spec = adapted.layout, config.layers
    everything = layout.trained.size * FP32_BYTES
    chosen = layout.blocks
    if spec.score == "all":
        how = "all layers are shared"
    elif spec.keep == "lossless":
        how = "at most; layers.keep=lossless chooses after the warm-up"
    else:
        number = layers.count(spec.keep, len(layout.layers))
        chosen = (*layout.layers[:number], HEAD)
        how = f"{number} of {len(layout.layers)} layers and the head are shared"
    rule = config.sharing.rule
    if rule != "layers":
        how += f", of them what sharing.rule={rule} lets travel"
    sampled = 1 if config.federation.pooled else config.federation.per_round
    variates = configured(config)
    sharing = Sharing(registry.SHARING[rule], layout)
    # What is shared may differ from one round to the next.
    first = config.curriculum.warmup
    turns = [sharing.split(first + turn, False, chosen) for turn in range(2)]
    shared = list(dict.fromkeys(split.shared.size * FP32_BYTES for split in turns))
    sent = " and ".join(f"{size * (1 + variates.travels) / 1e6:.2f}" for size in shared)
    total = " and ".join(f"{sampled * size * (1 + variates.travels) / 1e6:.2f}" for size in shared)
    turn = " in turns" if len(shared) > 1 else ""
    masks = any(registry.UPDATES[name].masks for name in config.updates.transforms)
    if masks:  # clients that have fewer values send fewer
        sent, total = f"at most {sent}", f"at most {total}"
    yield f"a round: each client sends {sent} MB{turn} ({how}), all {sampled} of them {total} MB"
    if first and max(shared) < everything:
        yield f"the first {first} rounds: {everything / 1e6:.2f} MB a client"
    if spec.sync_every is not None and SYNCED.holds(config):
        home = turns[0].personal.size * FP32_BYTES
        of_all = "" if home else ", whatever is chosen"
        whole = max(shared) * (1 + variates.travels) + home
        yield (
            f"every {spec.sync_every} rounds what stays home as well: {whole / 1e6:.2f} MB a "
            f"client (layers.sync_every){of_all}"
        )
    aggregation = registry.AGGREGATIONS[config.aggregation.rule](config, layout)
    yield from aggregation.plan()
    if aggregation.gathers:
        factors, residual = aggregation.part.size, layout.residual.size
        got = layout.trained.size - (factors if aggregation.draws else 0) + residual
        yield (
            f"  and gets {'at most ' * masks}{got * FP32_BYTES / 1e6:.2f} MB (aggregation.rule="
            f"{config.aggregation.rule}); the first rank holds what {sampled} clients send, "
            f"{sampled * factors * FP32_BYTES / 1e6:.2f} MB"
        )
    # From each slot sums of the values and of what the server's step needs; back, their means.
    width = 8 if config.collective.wire == "float64" else 4
    each = width * slots * (2 if masks else 1) + FP32_BYTES
    wires = [0 if slots == 1 else size / FP32_BYTES * (1 + variates.sums) * each for size in shared]
    moved = " and ".join(f"{wire / 1e6:.2f}" for wire in wires)
    yield (
        f"between the {slots} slots: {moved} MB through MPI and a few statistics, however many "
        "clients"
    )


def _lane_lines(
    config: Config, rows: list[ClientRows], cuts: fitting.Cuts, slots: int
) -> Iterator[str]:
    """Which slot runs which clients, by tokens of their rows."""
    if config.curriculum.cut != "none":
        at = [cuts.length(number) for number in range(config.federation.rounds)]
        whole = config.task.max_length
        full = next((f"from round {n + 1} on" for n, own in enumerate(at) if own == whole), "never")
        yield f"training texts are cut at {at[0]} tokens in round 1, at {whole} {full}"
    for round_number in range(min(ROUNDS_SHOWN, config.federation.rounds)):
        tokens = cuts.at(round_number)
        sampled = sampling.sample(config.seed, round_number, len(rows), config.federation.per_round)
        costs = {k: int(tokens.lengths[rows[k].train].sum()) for k in sampled}
        lanes = sampling.spread(costs, slots)
        loads = [sum(costs[k] for k in lane) for lane in lanes]
        busy = sum(loads) / (max(loads) * slots) if max(loads) else 0.0
        yield f"round {round_number + 1}: slots are busy {busy:.0%} of the time"
        for slot, (lane, load) in enumerate(zip(lanes, loads, strict=True)):
            names = ", ".join(f"{k} ({len(rows[k].train)} rows)" for k in lane) or "nobody"
            yield f"  slot {slot}: {names}: {load:,} tokens an epoch"
