"""Options that would break the bound, or that privacy makes nonsense of."""

from hpcfed.errors import UserError
from hpcfed.privacy.accountant import check_installed
from hpcfed.settings.config import Config
from hpcfed.settings.counts import PRIVATE


def check(config: Config) -> None:
    """Raises UserError, with the reason, for what cannot go with privacy."""
    if not PRIVATE.holds(config):
        return
    check_installed()
    faults = {
        "federation.min_clients above 1": (
            config.federation.min_clients > 1,
            "drawing a round again would tell who came through; a client that fails counts as one "
            "that sent nothing",
        ),
        "local.control": (
            config.local.control,
            "control variates travel beside the update, without clipping and noise",
        ),
        "server.control": (
            config.server.control,
            "its control variates are clients' own updates, without clipping and noise",
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
        f"updates.transforms={list(config.updates.transforms)}": (
            bool(config.updates.transforms),
            "transforms change what clients weigh or send, and all must weigh the same",
        ),
        "sharing.rule=nothing": (
            config.sharing.rule == "nothing",
            "nothing is sent, so there is nothing to protect; leave privacy out",
        ),
        f"aggregation.rule={config.aggregation.rule}": (
            config.aggregation.rule != "mean",
            "it takes what each client sends by itself, and noise is added to sums",
        ),
        "federation.pooled": (
            config.federation.pooled,
            "all rows are one client's, whose every round would be seen",
        ),
        "collective.wire=float32": (
            config.collective.wire == "float32",
            "sums must be exact for the noise to be what it says; use float64",
        ),
    }
    for what, (found, why) in faults.items():
        if found:
            raise UserError(f"{what} cannot go with privacy: {why}.")


def check_clients(config: Config, clients: int) -> None:
    """Raises UserError for a delta that so many clients make void."""
    delta = config.privacy.delta
    if PRIVATE.holds(config) and delta * clients >= 1:
        raise UserError(
            f"privacy.delta is {delta:g}, and there are {clients} clients: to publish one of them "
            f"whole would be allowed; it must be well below 1/{clients}."
        )
