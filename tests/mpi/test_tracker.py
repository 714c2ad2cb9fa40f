"""A run's tracker shows what metrics.jsonl holds, on the first rank only, over two lives."""

import json

import pytest

from tests.mpi.variants import COMMON
from tests.same import metrics


@pytest.mark.parametrize("shape", [(2, 1)])
def test_two_lives_of_a_run(worlds, data, tmp_path, shape):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = tmp_path / "run"
    words = ["run", "lora-fedavg", *COMMON, f"model.name={data}/bert-classifier",
             f"data.root={data}", "tracker=tensorboard", f"output={run}"]  # fmt: skip
    for rounds in (1, 3):
        told = worlds.call(
            shape, "tests.mpi.cases.runs:command_line",
            words=[*words, f"federation.rounds={rounds}", "--resume"],
        )  # fmt: skip
        assert told[0][0] == 0, told[0]
    assert len(list((run / "tensorboard").iterdir())) == 1
    events = accumulator.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    lines, summary = metrics(run), json.loads((run / "summary.json").read_text())
    for name, wanted in (("train_loss", [own["train_loss"] for own in lines]),
                         ("bytes/up", [own["bytes"]["up"] for own in lines])):  # fmt: skip
        found = events.Scalars(name)
        assert [own.step for own in found] == [1, 2, 3]
        assert [own.value for own in found] == pytest.approx(wanted, rel=1e-6)
    (last,) = events.Scalars("test/personal/accuracy")
    assert last.value == pytest.approx(summary["accuracy"]["personal"])
