"""Which rules for LoRA's factors can act together with the rest of a configuration."""

from hpcfed.errors import UserError
from hpcfed.settings.config import Config
from hpcfed.settings.counts import MOVING


def check_aggregation(config: Config) -> None:
    """Raises UserError for aggregation rules that cannot act."""
    rule, adapter = config.aggregation.rule, config.adapter
    named = f"aggregation.rule={rule}"
    if rule == "mean":
        return
    if adapter.kind != "lora" or config.sharing.rule != "layers" or config.layers.score != "all":
        raise UserError(
            f"{named} takes all clients' A and B of LoRA: it needs adapter.kind=lora, "
            "sharing.rule=layers and layers.score=all."
        )
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
