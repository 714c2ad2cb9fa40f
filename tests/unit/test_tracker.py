"""Trackers show the committed lines of metrics.jsonl, each once, whatever lives a run had; read
back by TensorBoard's own reader, and from the file that wandb would send."""

import importlib.util
import json
import struct
from dataclasses import replace

import pytest

from hpcfed.errors import UserError
from hpcfed.rounds.preflight import check_options
from hpcfed.rounds.tracker import begin, check_installed, scalars
from hpcfed.settings.config import Config
from hpcfed.settings.resolve import resolve

SUMMARY = {"rounds": 4, "test": {"personal": {"accuracy": 0.75}, "global": {"accuracy": 0.5}}}


def line(number, loss):
    return {
        "round": number, "clients": [3, 1], "failed": {"3": "its loss"}, "train_loss": loss,
        "bytes": {"up": 10 * number}, "mask_density": {"3": 0.5}, "validation": None,
    }  # fmt: skip


def write(run, lines):
    (run / "metrics.jsonl").write_text("".join(json.dumps(own) + "\n" for own in lines))


def lives(run, name):
    """Three rounds, of which the third is lost before its commit; then it goes on to a fourth."""
    config = replace(Config(), tracker=name)
    write(run, [])
    first = begin(config, run, "abc")
    for number in (1, 2):
        write(run, [line(n, n / 8) for n in range(1, number + 1)])
        first.round(line(number, number / 8))
    first.finish(None)
    # A commit whose line did not reach the tracker.
    write(run, [line(n, n / 8) for n in (1, 2, 3)])
    second = begin(config, run, "abc")
    write(run, [line(n, n / 8) for n in (1, 2, 3, 4)])
    second.round(line(4, 4 / 8))
    second.finish(SUMMARY)
    return {number: number / 8 for number in (1, 2, 3, 4)}


def test_the_numbers_of_a_record():
    assert dict(scalars(line(2, float("nan")))) == {"bytes/up": 20.0, "failed": 1.0}
    assert dict(scalars(line(2, 0.5)))["train_loss"] == 0.5


def test_tensorboard_has_each_round_once(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    wanted = lives(tmp_path, "tensorboard")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("train_loss")]
    assert found == sorted(wanted.items())
    assert set(events.Tags()["scalars"]) == {
        "train_loss", "failed", "bytes/up", "test/personal/accuracy", "test/global/accuracy",
    }  # fmt: skip
    (last,) = events.Scalars("test/personal/accuracy")
    assert (last.step, last.value) == (4, 0.75)


def logged(content):
    """The records of a file of wandb's: after 7 bytes blocks of 32 KB, in them pieces of records
    with a header of checksum, length, and whether it is a whole, first, middle or last one."""
    place, record = 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


@pytest.mark.long
def test_wandb_has_each_round_once(tmp_path, monkeypatch):
    protocol = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    for name, value in (("MODE", "offline"), ("SILENT", "true"), ("DISABLE_GIT", "true"),
                        ("DISABLE_CODE", "true")):  # fmt: skip
        monkeypatch.setenv(f"WANDB_{name}", value)
    wanted = lives(tmp_path, "wandb")
    found, identities = [], set()
    for file in sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb")):
        for data in logged(file.read_bytes()):
            record = protocol.Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                identities.add(record.run.run_id)
            if record.HasField("history"):
                items = {item.key or "/".join(item.nested_key): json.loads(item.value_json)
                         for item in record.history.item}  # fmt: skip
                found.append((items["_step"], items["train_loss"]))
    assert found == sorted(wanted.items())
    assert identities == {"abc"}


def test_a_tracker_that_is_missing_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("tensorboard", "wandb"):
        with pytest.raises(UserError, match=rf"needs the package {name}.*'hpcfed\[{name}\]'"):
            check_options(resolve("lora-fedavg", [f"tracker={name}"]), 1)
    check_installed(Config())


def test_one_that_cannot_begin_is_told_in_a_sentence(tmp_path):
    pytest.importorskip("tensorboard")
    write(tmp_path, [])
    (tmp_path / "tensorboard").write_text("no folder")
    with pytest.raises(UserError, match=r"^tracker=tensorboard cannot be begun .*--resume\.$"):
        begin(replace(Config(), tracker="tensorboard"), tmp_path, "abc")
