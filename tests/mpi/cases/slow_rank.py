"""Case: a rank that lags behind after an exchange."""

import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hpcfed.cluster.topology import Topology
from hpcfed.rounds.federation import Federation
from tests.mpi.cases.runs import federate

SECONDS = 0.5


def check(topology: Topology, folder: Path, words: list[str], preset: str) -> None:
    """The first rank has committed a round, and removed what it replaces, before the others have
    done their part of it: they find all that they need."""
    record = Federation._record

    def late(federation: Federation, *arguments: Any) -> Any:
        if not topology.is_root:
            time.sleep(SECONDS)
        return record(federation, *arguments)

    with patch.object(Federation, "_record", late):
        federate(topology, folder, {"run": words}, preset)
