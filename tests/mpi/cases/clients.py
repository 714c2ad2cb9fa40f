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
from tests.support import latest

ROWS, FEW, MANY, ROUNDS = 660, 60, 600, 2


def held() -> int:
    """Bytes in live tensors, and in what Python and numpy allocated since tracing began."""
    gc.collect()
    tensors = [own for own in gc.get_objects() if issubclass(type(own), torch.Tensor)]
    storages = {own.untyped_storage().data_ptr(): own.untyped_storage().nbytes() for own in tensors}
    return sum(storages.values()) + tracemalloc.get_traced_memory()[0]


def check(topology: Topology, out: Path) -> None:
    """Few clients and many, the same rows and as many clients a round."""
    clear(topology, out)
    (out / "rows").mkdir(parents=True)
    for split, count in (("train", ROWS), ("test", 20)):
        lines = [json.dumps({"text": f"cat {i}", "label": str(i % 2)}) for i in range(count)]
        (out / "rows" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    models.save("bert", out / "bert")
    found, kept = {}, {}
    for clients in (FEW, MANY):
        run = out / str(clients)
        federation = build(
            topology,
            "fedpeptao",
            [f"model.name={out}/bert", "task.name=rows", f"data.root={out}", f"output={run}",
             "adapter.virtual_tokens=50", "data.partition.kind=iid", "data.validation=0",
             f"federation.clients={clients}", f"federation.per_round={FEW}",
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
            assert record is not None
            federation.commit(record)
        found[clients] = held() - before
        tracemalloc.stop()
        files = [file for k in ("control", "moments") for file in run.glob(f"clients/*/{k}-*")]
        kept[clients] = len(latest(files))
        vector = federation.layout.size * 4
        federation.setup.directory.close()
        federation.setup.engine.close()
        del federation
    newcomers = kept[MANY] - kept[FEW]
    assert newcomers > 40, kept
    more = found[MANY] - found[FEW]
    # What they keep would be that many vectors and more; the lists of rows grow a little.
    assert more < 10 * vector, f"{newcomers} clients more take {more / vector:.1f} vectors more"
