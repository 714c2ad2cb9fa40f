"""Which options can act together: the contradictions that are refused."""

from hpcfed.errors import UserError
from hpcfed.settings.config import Config
from hpcfed.settings.counts import IN_FRONT, MOVING

_OF_LORA = ("ffa", "fedsa", "rolora")  # sharing rules that tell A from B


def check_combinations(config: Config) -> None:
    """Raises UserError for options that contradict each other."""
    kind, layers, server, local = config.adapter.kind, config.layers, config.server, config.local
    if kind in IN_FRONT and layers.score != "all":
        raise UserError(
            f"layers.score={layers.score} chooses among layers, but adapter.kind={kind} has values "
            "in one place only; use layers.score=all, or adapter.kind=prefix."
        )
    if kind == "attempt" and not config.adapter.sources:
        raise UserError(
            "adapter.kind=attempt mixes prompts that other tasks have trained, and there are none: "
            "run prompt-tuning on them, and give adapter.sources=[runs/.../adapter, ...]."
        )
    if server.optimizer != "momentum" and (server.control or server.gradient == "difference"):
        raise UserError(
            f"server.control and server.gradient=difference belong to server.optimizer=momentum, "
            f"not to {server.optimizer}."
        )
    if server.control and local.control:
        raise UserError(
            "local.control and server.control are two ways to use control variates; set one."
        )
    if local.momentum and local.optimizer != "sgd":
        raise UserError(
            f"local.momentum belongs to local.optimizer=sgd; {local.optimizer} has its own."
        )
    if local.moments == "keep" and local.optimizer == "sgd" and not local.momentum:
        raise UserError(
            "local.moments=keep: plain sgd has no moments to keep; set local.momentum, or reset."
        )
    if local.lr_schedule != "constant" and local.lr_end > local.lr:
        raise UserError(
            f"local.lr_end is {local.lr_end:g} and local.lr {local.lr:g}; a rate falls, so give a "
            "smaller local.lr_end."
        )
    if local.lr_schedule != "constant" and server.control and server.gradient == "difference":
        raise UserError(
            "server.control with server.gradient=difference divides by local.lr, so that it cannot "
            "change; use local.lr_schedule=constant."
        )
    if config.model.attention == "flash_attention_2" and config.model.dtype != "bf16":
        raise UserError(
            "model.attention=flash_attention_2 computes in 16 bits only; use model.dtype=bf16, or "
            "model.attention=sdpa."
        )
    _check_sharing(config)
    _check_aggregation(config)
    if config.model.head == "dpo":
        _check_preferences(config)


def _check_preferences(config: Config) -> None:
    """Raises UserError for what model.head=dpo, which passes two answers through the model, cannot
    have."""
    if config.adapter.kind != "lora":
        raise UserError(
            "model.head=dpo compares with the model whose adapter is off, which needs "
            f"adapter.kind=lora, not {config.adapter.kind}."
        )
    if config.layers.score in ("sensitivity", "eigenvalue") or config.layers.keep == "lossless":
        raise UserError(
            "model.head=dpo passes two answers a row, and layers.score=sensitivity and eigenvalue, "
            "and layers.keep=lossless, measure one; choose layers.score=first, last or random, and "
            "a share."
        )
    spec = config.curriculum
    if spec.pace != "all" and spec.difficulty in ("fisher", "reversed") and spec.when != "training":
        raise UserError(
            f"model.head=dpo takes curriculum.difficulty={spec.difficulty} from training passes "
            "only; use curriculum.when=training, or curriculum.difficulty=loss."
        )


def _check_sharing(config: Config) -> None:
    """Raises UserError for sharing rules and transforms that cannot act."""
    rule, local = config.sharing.rule, config.local
    if rule in _OF_LORA and config.adapter.kind != "lora":
        raise UserError(
            f"sharing.rule={rule} tells LoRA's A from its B, which adapter.kind="
            f"{config.adapter.kind} does not have; use adapter.kind=lora."
        )
    if rule == "fedalt" and config.layers.score == "all":
        raise UserError(
            "sharing.rule=fedalt trains personal layers and shared ones in turns, and with "
            "layers.score=all none is personal; choose another layers.score."
        )
    if rule in ("fedalt", "rolora") and (local.moments == "keep" or local.control):
        raise UserError(
            f"sharing.rule={rule} trains another part each time, so local.moments=keep and "
            "local.control cannot go with it."
        )
    transforms = config.updates.transforms
    if transforms and (config.server.control or local.control):
        raise UserError(
            "updates.transforms changes what clients weigh or send, and control variates would no "
            "longer hold: leave out server.control and local.control."
        )
    having = next((name for name in transforms if name in ("hetlora", "ranks")), None)
    if having and (
        config.adapter.kind != "lora" or config.updates.least_rank > config.adapter.rank
    ):
        raise UserError(
            f"{having} gives clients the first ranks of LoRA: it needs adapter.kind=lora, and "
            f"updates.least_rank ({config.updates.least_rank}) not above adapter.rank "
            f"({config.adapter.rank})."
        )
    if "hetlora" in transforms and rule in (*_OF_LORA, "nothing"):
        raise UserError(
            f"hetlora weighs clients by the B A that they send, and with sharing.rule={rule} they "
            "send at most one of the two; use sharing.rule=layers or fedalt."
        )


def _check_aggregation(config: Config) -> None:
    """Raises UserError for aggregation rules that cannot act."""
    rule, adapter = config.aggregation.rule, config.adapter
    named = f"aggregation.rule={rule}"
    if rule == "mean":
        return
    kind = "adalora" if rule == "budget" else "lora"
    if adapter.kind != kind or config.sharing.rule != "layers" or config.layers.score != "all":
        raise UserError(
            f"{named} takes the factors of all clients' LoRA: it needs adapter.kind={kind}, "
            "sharing.rule=layers and layers.score=all."
        )
    if rule == "budget":
        _check_budget(config)
    if config.server.optimizer != "mean" or config.local.control:
        raise UserError(
            f"{named} is the server's step itself: it needs server.optimizer=mean, and no "
            "local.control."
        )
    others = sorted({*config.updates.transforms} - {"ranks"})
    if others:
        raise UserError(
            f"{named} takes what each client sends by itself, which updates.transforms="
            f"{others[0]} is not made for; of transforms it goes with `ranks` alone."
        )
    if config.updates.transforms and rule not in ("flora", "flexlora"):
        raise UserError(
            f"{named} averages A and B, and clients of different rank (ranks) send other parts of "
            "them; use aggregation.rule=flora or flexlora."
        )
    if config.local.moments == "keep" and rule in ("flora", "flexlora"):
        raise UserError(
            f"{named} gives clients other factors every round, so local.moments=keep cannot go "
            "with it."
        )
    if rule in MOVING and not adapter.residual:
        raise UserError(
            f"{named} moves the backbone by a residual of rank adapter.residual, which is 0; set "
            "it, to 64 for example."
        )
    if rule in MOVING and adapter.start is not None:
        raise UserError(
            f"{named} cannot begin with adapter.start: an adapter folder does not tell LoRA from "
            "the residual beside it."
        )
    if rule in MOVING and config.model.head == "dpo":
        raise UserError(
            f"{named} moves the backbone, and model.head=dpo compares with one that stands still; "
            "use aggregation.rule=flexlora or fair."
        )
    if rule == "delta" and not (
        adapter.delta and not adapter.dropout and not config.curriculum.warmup
    ):
        raise UserError(
            f"{named} lets the backbone follow each step of B A from the first on: it needs "
            "adapter.delta above 0, adapter.dropout=0 and curriculum.warmup=0."
        )


def _check_budget(config: Config) -> None:
    """Raises UserError for a schedule that cannot be kept."""
    spec, rank = config.aggregation, config.adapter.rank
    if spec.budget > rank:
        raise UserError(
            f"aggregation.budget is {spec.budget:g} but adapter.rank is {rank}; no more singular "
            "values can be left of a matrix than it begins with."
        )
    if spec.prune_from >= spec.prune_to:
        raise UserError(
            f"aggregation.prune_from is {spec.prune_from:g} but aggregation.prune_to is "
            f"{spec.prune_to:g}; singular values must begin to go before the last has gone."
        )
