"""Case: what a rank holds does not grow with the number of clients, only the files do."""

import gc
import json
import tracemalloc
from pathlib import Path

import torch

from hpcfed.cluster.topology import Topology
from hpcfed.rounds.progress import Progress
from tests import models
from tests.mpi.cases.runs import build, clear

ROWS, PER_ROUND, ROUNDS = 1100, 100, 3


def held() -> int:
    """Bytes in live tensors, and in what Python and numpy allocated since tracing began."""
    gc.collect()
    tensors = [own for own in gc.get_objects() if issubclass(type(own), torch.Tensor)]
    storages = {own.untyped_storage().data_ptr(): own.untyped_storage().nbytes() for own in tensors}
    return sum(storages.values()) + tracemalloc.get_traced_memory()[0]


def check(topology: Topology, out: Path) -> None:
    """100 and 1,000 clients, the same rows and as many clients a round."""
    clear(topology, out)
    (out / "rows").mkdir(parents=True)
    for split, count in (("train", ROWS), ("test", 20)):
        lines = [json.dumps({"text": f"cat {i}", "label": str(i % 2)}) for i in range(count)]
        (out / "rows" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    models.save("bert", out / "bert")
    found, kept = {}, {}
    for clients in (100, 1000):
        run = out / str(clients)
        federation = build(
            topology,
            "fedpeptao",
            [f"model.name={out}/bert", "task.name=rows", f"data.root={out}", f"output={run}",
             "adapter.virtual_tokens=50", "data.partition.kind=iid", "data.validation=0",
             f"federation.clients={clients}", f"federation.per_round={PER_ROUND}",
             f"federation.rounds={ROUNDS}", "curriculum.warmup=0", "local.epochs=1",
             "local.moments=keep", "task.max_length=32", "layers.probe_clients=2",
             "evaluation.every=9",
             "server.control=true", "sparsity.keep=0.5", "cluster.threads=1"],
        )  # fmt: skip
        tracemalloc.start()
        before = held()
        federation.begin_method(Progress(speaks=False))
        for _ in range(ROUNDS):
            record, _ = federation.round(Progress(speaks=False))
            federation.commit(record)
        found[clients] = held() - before
        tracemalloc.stop()
        kept[clients] = sum(len(list(run.glob(f"clients/*/{k}-*"))) for k in ("control", "moments"))
        vector = federation.layout.size * 4
        federation.setup.directory.close()
        federation.setup.client.close()
        del federation
    assert kept[1000] > 2 * kept[100], kept
    more = found[1000] - found[100]
    # What 100 clients keep would be 100 vectors and more; the lists of rows grow a little.
    assert more < 10 * vector, f"{found}: 900 clients more take {more / vector:.1f} vectors more"
