"""`hpcfed compare` on a folder of one's own: from nothing to tables; what is finished stays."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.support import ROOT

SPEC = """
folder: {folder}/c
overrides:
  model.name: {data}/bert-classifier
  model.dropout: 0
  data.root: {folder}/data
  task.max_length: 16
  federation: {{clients: 4, per_round: 2, rounds: 3}}
  data.validation: 0.2
  evaluation.every: 1
  cluster.threads: 1
  deepspeed: ds_configs/zero0.json
methods: [lora-fedavg, {{method: fibecfed, curriculum.warmup: 1, layers.probe_clients: 2}}]
tasks: [own]
seeds: [1]
"""


def write(folder):
    place = folder / "data" / "own"
    place.mkdir(parents=True)
    for name, rows in (("train", 64), ("test", 24)):
        lines = [f"{('red', 'blue')[i % 2]} thing {i},{'ab'[i % 2]}" for i in range(rows)]
        (place / f"{name}.csv").write_text("text,label\n" + "\n".join(lines) + "\n")


def compare(spec, *more):
    return subprocess.Popen(
        [sys.executable, "-m", "hpcfed", "compare", str(spec), *more],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.long
def test_stopped_half_way_it_goes_on_and_repeats_nothing(data, tmp_path):
    write(tmp_path)
    spec = tmp_path / "spec.yaml"
    spec.write_text(SPEC.format(folder=tmp_path, data=data))
    cells = tmp_path / "c" / "cells"

    def finished():
        return {own: own.stat().st_mtime_ns for own in cells.glob("*.json")}

    first = compare(spec)
    deadline = time.monotonic() + 150
    while not finished() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    said, _ = first.communicate(timeout=60)
    assert first.returncode == 75, said
    assert "give the same command again" in said
    before = finished()
    assert len(before) == 1, said

    second = compare(spec)
    said, _ = second.communicate(timeout=150)
    assert second.returncode == 0, said
    assert len(finished()) == 2 and before.items() <= finished().items()
    lines = list(csv.DictReader((tmp_path / "c" / "table.csv").open()))
    assert [line["method"] for line in lines] == ["lora-fedavg", "fibecfed"]
    by_method = {own["method"]: own for own in json.loads((tmp_path / "c/cells.json").read_text())}
    for line in lines:
        assert float(line["score"]) == by_method[line["method"]]["test"]["last"]["personal"]
    assert 0 < float(lines[1]["up_in_all_share"]) < 1 == float(lines[0]["up_in_all_share"])

    tables = {own: own.read_bytes() for own in (tmp_path / "c").glob("table.*")}
    assert b"\\toprule" in tables[tmp_path / "c" / "table.tex"]
    third = compare(spec, "--table-only")
    said, _ = third.communicate(timeout=60)
    assert third.returncode == 0, said
    assert {own: own.read_bytes() for own in (tmp_path / "c").glob("table.*")} == tables
    assert finished().keys() == {*before, *finished()}
