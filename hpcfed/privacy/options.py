"""Options that would break the bound, or that privacy makes nonsense of."""

from collections.abc import Sequence

from hpcfed.errors import UserError
from hpcfed.privacy.accountant import check_installed
from hpcfed.settings.config import Config
from hpcfed.settings.counts import PRIVATE

Faults = dict[str, tuple[bool, str]]  # what -> whether it is so, and why it cannot be


def check(config: Config) -> None:
    """Raises UserError, with the reason, for what cannot go with privacy."""
    if not PRIVATE.holds(config):
        return
    check_installed()
    common = {
        "federation.min_clients above 1": (
            config.federation.min_clients > 1,
            "drawing a round again would tell who came through; a client that fails counts as one "
            "that sent nothing",
        ),
        "layers.keep=lossless": (
            config.layers.score != "all" and config.layers.keep == "lossless",
            "the number of layers would be read from clients' data; give a share",
        ),
        "layers.sync_every": (
            config.layers.sync_every is not None,
            "values that stay home would travel beside the update, without clipping and noise",
        ),
        f"layers.score={config.layers.score}": (
            config.layers.score not in ("all", "first", "last", "random"),
            "the scores are made of clients' data; choose layers by first, last or random",
        ),
        "sharing.rule=nothing": (
            config.sharing.rule == "nothing",
            "nothing is sent, so there is nothing to protect; leave privacy out",
        ),
        "federation.pooled": (
            config.federation.pooled,
            "all rows are one client's, whose every round would be seen",
        ),
    }
    by_client = config.privacy.unit == "client"
    faults = common | (_of_clients(config) if by_client else _of_samples(config))
    for what, (found, why) in faults.items():
        if found:
            raise UserError(f"{what} cannot go with privacy: {why}.")


def _of_clients(config: Config) -> Faults:
    return {
        "local.control": (
            config.local.control,
            "control variates travel beside the update, without clipping and noise",
        ),
        "server.control": (
            config.server.control,
            "its control variates are clients' own updates, without clipping and noise",
        ),
        f"updates.transforms={list(config.updates.transforms)}": (
            bool(config.updates.transforms),
            "transforms change what clients weigh or send, and all must weigh the same",
        ),
        f"aggregation.rule={config.aggregation.rule}": (
            config.aggregation.rule != "mean",
            "it takes what each client sends by itself, and noise is added to sums",
        ),
        "collective.wire=float32": (
            config.collective.wire == "float32",
            "sums must be exact for the noise to be what it says; use float64",
        ),
    }


def _of_samples(config: Config) -> Faults:
    with_rows = "privacy.unit=sample with "
    return {
        f"{with_rows}curriculum.pace={config.curriculum.pace}": (
            config.curriculum.pace != "all",
            "a curriculum chooses the rows of a step by what they are, and they must be drawn by "
            "chance; use curriculum.pace=all",
        ),
        f"{with_rows}sparsity.keep={config.sparsity.keep:g}": (
            config.sparsity.keep < 1,
            "what trains would be chosen by rows' gradients without noise; use sparsity.keep=1",
        ),
        f"{with_rows}privacy.clip=adaptive": (
            config.privacy.clip == "adaptive",
            "the norm of a row's gradient is a number that you give",
        ),
        f"{with_rows}model.dtype=bf16": (
            config.model.dtype == "bf16",
            "a norm that is rounded to 8 bits does not bound a gradient; use fp32",
        ),
        f"{with_rows}model.head=dpo": (
            config.model.head == "dpo",
            "its gradients by row come of two answers, and are measured for one",
        ),
        f"{with_rows}sharing.rule=fedalt": (
            config.sharing.rule == "fedalt",
            "its two phases would be accounted as one; use another sharing.rule",
        ),
        f"{with_rows}adapter.kind={config.adapter.kind}": (
            config.adapter.kind != "lora",
            "gradients by row are checked for lora alone",
        ),
    }


def check_clients(config: Config, rows: Sequence[int]) -> None:
    """Raises UserError for a delta that so many clients, or rows of one, make void. rows: that each
    client trains on."""
    delta = config.privacy.delta
    if not PRIVATE.holds(config):
        return
    by_client = config.privacy.unit == "client"
    number = len(rows) if by_client else max(rows)
    if delta * number >= 1:
        raise UserError(
            f"privacy.delta is {delta:g}, and there are {number} "
            f"{'clients' if by_client else 'rows in a client'}: to publish one of them whole would "
            f"be allowed; it must be well below 1/{number}."
        )
