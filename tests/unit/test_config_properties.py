"""Properties of configurations: what is written is read again as it was, and whatever stands in a
file or an override, nothing but a UserError comes of it."""

import json
import typing
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcfed.errors import UserError
from hpcfed.rounds.preflight import check_options
from hpcfed.settings import deepspeed_config
from hpcfed.settings.resolve import (
    as_text,
    changed,
    describe,
    options,
    presets,
    resolve,
    type_of,
)
from hpcfed.settings.values import MOST_REAL, MOST_WHOLE

few = settings(max_examples=50, deadline=None, derandomize=True, database=None)
many = settings(few, max_examples=150)

# No NUL, which no file's name holds, and no halves of characters, which no file does.
texts = st.text(st.characters(min_codepoint=1, exclude_categories=["Cs"]), max_size=12)
names = texts.map(lambda text: text.replace("/", "|"))


def legal(key, spec):
    """A strategy for the legal values of an option."""
    bounds, hint = spec.metadata["bounds"], type_of(key)
    if spec.metadata["names"] is not None:
        known = list(spec.metadata["names"])
        return st.lists(st.sampled_from(known)) if spec.default == () else st.sampled_from(known)
    whole = typing.get_origin(hint) in (typing.Literal, tuple)
    kinds = (hint,) if whole else typing.get_args(hint)
    return st.one_of([of_kind(kind, bounds, spec) for kind in kinds or (hint,)])


def of_kind(kind, bounds, spec):
    low = bounds.get("at_least", bounds.get("above", -MOST_REAL))
    high = bounds.get("at_most", bounds.get("below"))
    if typing.get_origin(kind) is typing.Literal:
        return st.sampled_from(typing.get_args(kind))
    if kind is int:
        return st.integers(int(low), int(high if high is not None else MOST_WHOLE))
    if kind is float:
        return st.floats(
            low, high if high is not None else MOST_REAL, allow_nan=False,
            exclude_min="above" in bounds, exclude_max="below" in bounds,
        )  # fmt: skip
    if typing.get_origin(kind) is tuple:
        return st.lists(texts, min_size=1, max_size=3)
    if typing.get_origin(kind) is Mapping:
        return st.dictionaries(texts, texts, max_size=3)
    return {bool: st.booleans(), type(None): st.none(), str: names}[kind]


# Files that have to be there: see tests/unit/test_plugins.py.
VALUES = {key: legal(key, spec) for key, spec in options() if key not in ("plugins", "method")}


@st.composite
def overrides(draw):
    """Option -> value, for some of them."""
    keys = draw(st.lists(st.sampled_from(sorted(VALUES)), unique=True))
    return {key: draw(VALUES[key]) for key in keys}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """hypothesis wants no fixture that is made anew for each example."""
    return tmp_path_factory.mktemp("configurations")


@few
@given(preset=st.sampled_from(sorted(presets())), values=overrides())
def test_a_configuration_is_read_as_it_was_written(folder, preset, values):
    words = [f"{key}={as_text(value)}" for key, value in values.items()]
    resolved = resolve(preset, words)
    written = describe(resolved)
    assert changed(resolved.config, written) == {}
    file = folder / "config.yaml"
    file.write_text(written + "\n")
    again = resolve(str(file))
    assert again.config == resolved.config
    assert set(again.origin.values()) == {str(file)}
    for key, value in values.items():
        now = resolved.config
        for part in key.split("."):
            now = getattr(now, part)
        assert now == (tuple(value) if isinstance(value, list) else value), key


@pytest.mark.parametrize("name", ["a\nb.yaml", "a # b.yaml", "a\x85\u2028b.yaml", "é: [.yaml"])
def test_any_name_of_a_file(tmp_path, name):
    file = tmp_path / name
    file.write_text("seed: 7\nlocal: {lr: 0.1}\n")
    resolved = resolve(str(file), ["local.epochs=3"])
    again = tmp_path / "again.yaml"
    again.write_text(describe(resolved) + "\n")
    assert changed(resolved.config, again.read_text()) == {}
    assert resolve(str(again)).config == resolved.config


def test_what_a_run_would_refuse_is_not_hidden_by_what_describe_writes(tmp_path):
    """All values stand in the file, those without effect too, and it is taken as it is."""
    for preset in presets():
        file = tmp_path / f"{preset}.yaml"
        needed = ["adapter.sources=[runs/trec/adapter]"] if preset == "attempt" else []
        file.write_text(describe(resolve(preset, needed)))
        again = resolve(str(file))
        check_options(again, again.config.cluster.ranks_per_client)


PIECES = [
    "local", "lr", "seed", "method", "base", "plugins", "task", "verbalizer", "name", "output", ":",
    ": ", "\n", "\n  ", " ", "{", "}", "[", "]", ", ", "- ", "? ", "&a ", "*a", "<<", "!!int ",
    "!!float ", "!!timestamp ", "!!bool ", "!!set ", "!!omap ", "!!pairs ", "!!binary ", "!!map ",
    "!!seq ", "!!null ", "!x ", "1", "-0", "1e400", ".inf", ".nan", "0x", "0b2", "1:99",
    "2026-13-45", "0o9", "_", "9" * 5000, "0x" + "f" * 5000, "null", "~", "true", "'", '"', "\\x",
    "\\ud800", "|",
    ">", "%YAML 9.9", "---", "...", "@", "`", "\t", "#", "\0", "\x85", "\ufeff", "é", "demo", "=",
    ".",
]  # fmt: skip
yaml_like = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)


def refusal(act):
    """What is said of it, if it is refused; anything else but a UserError comes through."""
    try:
        act()
    except UserError as error:
        return str(error)
    return ""


def only_user_errors(source, words=()):
    assert len(refusal(lambda: check_options(resolve(source, words), 1))) < 3000


@many
@given(text=st.one_of(st.text(), yaml_like))
def test_any_text_in_a_file(folder, text):
    file = folder / "any.yaml"
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    only_user_errors(str(file))


@few
@given(content=st.binary())
def test_any_bytes_in_a_file(folder, content):
    file = folder / "any.yaml"
    file.write_bytes(content)
    only_user_errors(str(file))


keys = st.one_of(st.sampled_from([key for key, _ in options()]), yaml_like)
any_value = st.one_of(
    yaml_like, st.text(), st.integers().map(str), st.floats().map(str), st.none().map(as_text),
    st.lists(st.integers()).map(as_text),
)  # fmt: skip


@many
@given(
    source=st.one_of(st.sampled_from(["demo", "fibecfed", "fedpeptao"]), st.text()),
    words=st.lists(st.tuples(keys, any_value).map("=".join), max_size=3),
)
def test_any_override(source, words):
    only_user_errors(source, words)


SECTIONS = [
    "zero_optimization", "bf16", "fp16", "bfloat16", "data_types", "amp", "comms_logger",
    "steps_per_print", "gradient_predivide_factor", "communication_data_type", "optimizer",
    "stage", "enabled", "offload_param", "offload_optimizer", "device", "ratio", "leaf_module",
    "reduce_bucket_size", "stage3_max_live_parameters", "zenflow", "cpu_offload", "names",
    "select_interval", "zero_hpz_partition_size", "zero_quantized_weights", "grad_accum_dtype",
]  # fmt: skip
json_like = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3),
        st.sampled_from([0, 1, 2, 3, 4, "auto", "cpu", "nvme", "bf16", -1, 0.5, 5e8]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2), st.dictionaries(st.sampled_from(SECTIONS), inner, max_size=4)
    ),
    max_leaves=12,
)  # fmt: skip


@many
@given(content=json_like)
def test_any_deepspeed_json(folder, content):
    file: Path = folder / "any.json"
    file.write_text(json.dumps(content))
    config = resolve("lora-fedavg", [f"deepspeed={file}"]).config
    said = refusal(lambda: deepspeed_config.load(config))
    assert len(said) < 3000
    if not said:
        assert deepspeed_config.zero_stage(deepspeed_config.load(config)) in (0, 1, 2, 3)
