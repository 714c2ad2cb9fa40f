"""Failures that are asked for (HPCFED_FAIL_AT): what they cost, and what they leave."""

import json

import pytest
from safetensors.torch import load_file

from tests.mpi.test_instruct import overrides as talks
from tests.mpi.variants import overrides
from tests.same import metrics

SECOND = "round=2 client=1 kind="


@pytest.fixture
def hpcfed(worlds, data, tmp_path):
    """hpcfed(shape, name, *words, fail=...): a run's code and output, by the world's ranks; its
    directory is tmp_path/name."""

    def call(shape, name, *words, fail="", stage="zero0", variant="accumulate"):
        line = [
            "run", "lora-fedavg", *overrides(data, variant, stage),
            f"model.name={data}/bert-classifier", "federation.per_round=4",
            f"cluster.ranks_per_client={shape[1]}", f"output={tmp_path / name}", *words,
        ]  # fmt: skip
        ranks = worlds.call(
            shape,
            "tests.mpi.cases.runs:command_line",
            words=line,
            variables={"HPCFED_FAIL_AT": fail},
        )
        codes = {code for code, _, _ in ranks}
        assert len(codes) == 1, ranks
        return codes.pop(), "".join(out + err for _, out, err in ranks)

    return call


def rounds(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


ONE, TWO = (1, 1), (1, 2)
SHAPES = [
    *((ONE, stage, ("oom", "nan")) for stage in ("zero0", "zero2")),
    (ONE, "zero3", ("nan",)),
    *((TWO, stage, ("nan",)) for stage in ("zero0", "zero3")),
    *(
        pytest.param(*case, marks=pytest.mark.long)
        for case in (
            *((ONE, stage, ("oom", "nan")) for stage in ("zero1", "zero3", "offload")),
            (TWO, "zero0", ("oom", "nan")),
            (TWO, "zero2", ("nan",)),
        )
    ),
]


@pytest.mark.parametrize(("shape", "stage", "kinds"), SHAPES)
def test_a_fault_costs_its_client_alone(hpcfed, tmp_path, shape, stage, kinds):
    """However a client fails, the run goes on with the same bits as if it had failed before its
    first step: nothing of a backward that was left stays in the engine."""
    why = {"exception": "RehearsedError: rehearsed", "oom": "OutOfMemoryError", "nan": "not finite"}
    whole = {}
    for kind in ("exception", *kinds):
        code, printed = hpcfed(shape, kind, fail=SECOND + kind, stage=stage)
        assert code == 0, printed
        lines = rounds(tmp_path / kind)
        assert [list(line["failed"]) for line in lines] == [[], ["1"], []]
        assert why[kind] in lines[1]["failed"]["1"]
        assert "client 1 failed and was left out: " in printed
        whole[kind] = adapter(tmp_path / kind)
    for kind in kinds:
        assert_same_tensors(whole["exception"], whole[kind])


def assert_same_tensors(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.equal(other[name]), name


@pytest.mark.parametrize("shape", [(1, 1), (2, 1)])
def test_too_few_are_drawn_again(hpcfed, tmp_path, shape):
    """A round under federation.min_clients is drawn again with others; the run ends, resumable,
    when that does not help, and goes on with the same bits."""
    words = ["federation.per_round=2", "federation.min_clients=2"]
    code, _ = hpcfed(shape, "whole", *words)
    first, *_ = rounds(tmp_path / "whole")
    client = first["clients"][0]
    code, printed = hpcfed(
        shape, "again", *words, "evaluation.every=1", fail=f"round=1 client={client} kind=nan"
    )
    assert code == 0 and "1 of 2 clients came through, 2 must" in printed
    line, *_ = rounds(tmp_path / "again")
    (dropped,) = line["redrawn"]
    assert dropped["clients"] == first["clients"] and list(dropped["failed"]) == [str(client)]
    assert not line["failed"] and not set(line["clients"]) & set(first["clients"])
    summary = json.loads((tmp_path / "again" / "summary.json").read_text())
    assert summary["failures"] == 1
    assert summary["samples"] == dropped["samples"] + sum(
        r["samples"] for r in rounds(tmp_path / "again")
    )

    everyone = "; ".join(f"round=2 client={k} kind=exception" for k in range(4))
    code, printed = hpcfed(shape, "ended", *words, fail=everyone)
    assert code == 1
    assert "Round 2 has come to nothing: in 4 draws of 2 clients" in printed
    assert printed.count("others are drawn") == 4 and "--resume" in printed
    assert not (tmp_path / "ended" / "summary.json").exists()
    code, _ = hpcfed(shape, "ended", *words, "--resume")
    assert code == 0
    assert_same_tensors(adapter(tmp_path / "whole"), adapter(tmp_path / "ended"))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "ended")


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
@pytest.mark.parametrize("shape", [(1, 2)])
def test_a_failure_inside_a_forward(worlds, data, tmp_path, shape, stage):
    """It is told, unless the client's other ranks wait for this one: then it ends the job."""
    words = [*talks(data, "llama"), "evaluation.max_new_tokens=5"]
    for found in worlds.call(
        shape, "tests.mpi.cases.faults:inside", out=tmp_path / "run",
        words=[*words, f"deepspeed=ds_configs/{stage}.json"],
    ):  # fmt: skip
        said = "ends" if stage == "zero3" else "ValueError: a block fails"
        assert found == dict.fromkeys(("train", "predict", "write"), said)


@pytest.mark.parametrize("shape", [(2, 1)])
def test_clients_that_cannot_be_evaluated(hpcfed, tmp_path, shape):
    """They are named and left out; the others' score is that of a run without their rows."""
    words = ["layers.score=last", "layers.keep=0.5", "evaluation.every=1", "data.validation=0.3"]
    code, printed = hpcfed(shape, "run", *words, fail="round=2 client=2 kind=exception in=evaluate")
    assert code == 0, printed
    lines = rounds(tmp_path / "run")
    assert [list(line.get("not_evaluated", {})) for line in lines] == [[], ["2"], []]
    assert "client 2 was not evaluated as a whole: RehearsedError" in printed


@pytest.mark.parametrize(
    ("text", "says"),
    [("round=1 kind=flood", "a kind of exception"), ("kind=nan", "must look like"),
     ("round=x kind=nan", "must look like"), ("round=1 kind=nan in=commit", "a phase of"),
     ("round=1 kind=oom size=3", "must look like"), ("round=0 kind=nan", "must look like"),
     ("round=\u00b2 kind=nan", "must look like"), (f"round={'9' * 5000} kind=nan", "look like")],
)  # fmt: skip
def test_no_such_fault(hpcfed, tmp_path, text, says):
    code, printed = hpcfed((1, 1), "run", fail=text)
    assert code == 2 and says in printed and "HPCFED_FAIL_AT" in printed
    assert not (tmp_path / "run").exists()
