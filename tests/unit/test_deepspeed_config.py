"""The DeepSpeed JSON: what is read from DeepSpeed's source is what its classes have."""

import importlib
import json
import typing

import pytest
from pydantic import BaseModel

from hpcfed.errors import UserError
from hpcfed.settings import deepspeed_config
from hpcfed.settings.deepspeed_config import _SECTIONS
from hpcfed.settings.deepspeed_keys import known
from hpcfed.settings.resolve import resolve


def of_class(section):
    """Key -> field, of a real class, by alias and by name."""
    fields = section.model_fields
    return {**fields, **{own.alias: own for own in fields.values() if own.alias}}


def check(section, keys):
    """The names, ranges and types of a class, and of the classes of its fields."""
    fields = of_class(section)
    assert set(keys) == set(fields)
    for name, field in fields.items():
        key = keys[name]
        real = {}
        for limit in field.metadata:
            real |= {n: getattr(limit, n) for n in ("ge", "gt", "le", "lt") if hasattr(limit, n)}
        assert key.bounds == real, name
        kinds = set(typing.get_args(field.annotation)) or {field.annotation}
        assert key.optional == (type(None) in kinds), name
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if inner:
            check(inner[0], key.section)
        else:
            assert key.section is None
        plain = {kind.__name__ for kind in kinds if kind in (bool, int, float, list)}
        assert plain <= set(key.kinds), name


@pytest.mark.parametrize("section", _SECTIONS)
def test_keys_and_ranges_are_those_of_the_classes(section):
    file, name = _SECTIONS[section]
    module = importlib.import_module(f"deepspeed.{file.removesuffix('.py').replace('/', '.')}")
    check(getattr(module, name), known(file, name))


def loaded(tmp_path, content, *words):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    return deepspeed_config.load(resolve("lora-fedavg", [f"deepspeed={path}", *words]).config)


GOOD = {
    "all of stage 3": ({
        "zero_optimization": {
            "stage": 3, "reduce_bucket_size": 5e6, "overlap_comm": None, "sub_group_size": 10**9,
            "max_live_parameters": 10, "offload_param": {"device": "cpu", "pin_memory": False},
            "offload_optimizer": None, "leaf_module": {"names": ["a"]},
        },
        "wall_clock_breakdown": False, "train_batch_size": "auto", "steps_per_print": 10,
        "comms_logger": {"enabled": False, "prof_ops": ["all_reduce"]},
    }, ()),
    "bf16": ({
        "zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"check_grad_overflow": False}, "communication_data_type": "bf16",
        "fp16": {"enabled": False}, "zero_allow_untested_optimizer": True,
    }, ("model.dtype=bf16",)),
    "nothing": ({}, ()),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_what_is_taken_is_taken_by_deepspeed(tmp_path, name):
    content, words = GOOD[name]
    settings = loaded(tmp_path, content, *words)
    before = json.dumps(settings)
    deepspeed_config.verify(settings)
    assert json.dumps(settings) == before
    assert "auto" not in settings.values()


def test_what_only_the_classes_know_is_said_in_a_sentence(tmp_path):
    settings = loaded(tmp_path, {"zero_optimization": {"stage": 3, "compute_grad_norm": False}})
    with pytest.raises(UserError, match="compute_grad_norm=false is supported only with") as caught:
        deepspeed_config.verify(settings)
    assert "\n" not in str(caught.value)
