"""Case: what this process listens at."""

import os
from pathlib import Path

from hpcfed.cluster.topology import Topology

LISTEN = "0A"


def listening(topology: Topology) -> list[str]:
    """The local addresses of this process's listening TCP sockets, as the kernel writes them."""
    own = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            own.add(os.readlink(entry))
        except OSError:  # the folder's own
            continue
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN and f"socket:[{fields[9]}]" in own:
                found.append(fields[1].partition(":")[0])
    return found
