"""Layer choice, sampling, spreading over slots, the server step, randomness, DeepSpeed JSON."""

import json
from dataclasses import replace

import numpy as np
import pytest

from hpcfed.errors import UserError
from hpcfed.policies.layers import choose
from hpcfed.policies.sampling import sample, spread
from hpcfed.rng import derive, generator
from hpcfed.settings import deepspeed_config
from hpcfed.settings.config import Cluster, Config, Local, Model

LAYERS = tuple("012345")


def test_which_layers_are_shared():
    rng = np.random.default_rng(0)
    assert choose("all", 1, LAYERS, rng) == list(LAYERS)
    assert choose("first", 3, LAYERS, rng) == ["0", "1", "2"]
    assert choose("last", 2, LAYERS, rng) == ["4", "5"]
    drawn = {tuple(choose("random", 3, LAYERS, np.random.default_rng(s))) for s in range(40)}
    assert all(len(d) == 3 and list(d) == sorted(d) for d in drawn)
    assert len(drawn) > 5


def test_sampling_is_uniform_without_replacement():
    counts = np.zeros(20)
    for number in range(2000):
        drawn = sample(3, number, 20, 5)
        assert len(set(drawn)) == 5 and drawn == sorted(drawn)
        counts[drawn] += 1
    assert abs(counts / 2000 - 0.25).max() < 0.05
    assert sample(3, 7, 20, 5) == sample(3, 7, 20, 5) != sample(4, 7, 20, 5)
    assert sample(3, 0, 5, 5) == [0, 1, 2, 3, 4]


def test_spreading_is_complete_balanced_and_longest_first():
    rng = np.random.default_rng(0)
    for slots in (1, 2, 4, 8):
        costs = {int(k): int(c) for k, c in enumerate(rng.integers(1, 1000, 30))}
        lanes = spread(costs, slots)
        assert sorted(k for lane in lanes for k in lane) == list(range(30))
        for lane in lanes:
            own = [costs[k] for k in lane]
            assert own == sorted(own, reverse=True)
        loads = [sum(costs[k] for k in lane) for lane in lanes]
        assert max(loads) <= 4 / 3 * max(sum(costs.values()) / slots, max(costs.values()))
    assert spread({1: 5}, 3) == [[1], [], []]


def test_draws_depend_on_every_part_of_their_purpose():
    seeds = {derive(s, p, i, j) for s in (0, 1) for p in "ab" for i in (1, 11) for j in (1, 11)}
    assert len(seeds) == 16
    assert derive(0, "a", 1) == derive(0, "a", 1) < 2**63
    assert generator(0, "a").random() == generator(0, "a").random()


def settings(tmp_path, content, **config):
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return deepspeed_config.load(replace(Config(deepspeed=str(path)), **config))


def test_deepspeed_settings_are_completed(tmp_path):
    found = settings(
        tmp_path,
        {"zero_optimization": {"stage": 2}, "train_batch_size": "auto", "optimizer": "auto"},
        local=Local(batch_size=9, clip=0.5), cluster=Cluster(ranks_per_client=2),
        model=Model(dtype="bf16"),
    )  # fmt: skip
    assert found["train_micro_batch_size_per_gpu"] == 5
    assert found["train_batch_size"] == 10
    assert found["gradient_clipping"] == 0.5
    assert found["bf16"]["enabled"] is True
    assert "optimizer" not in found
    assert deepspeed_config.zero_stage(found) == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"train_batch_size": 8}, ["train_batch_size", "local.batch_size"]),
        ({"gradient_clipping": 2.0}, ["gradient_clipping", "local.clip"]),
        ({"optimizer": {"type": "Adam"}}, ["optimizer", "local.optimizer"]),
        ({"fp16": {"enabled": True}}, ["fp16", "bf16"]),
        ({"bf16": {"enabled": True}}, ["bf16", "model.dtype"]),
        ({"zero_optimization": {"stage": 4}}, ["stage", "0, 1, 2, 3"]),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, ["zero_hpz"]),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, ["nvme", "cpu"]),
        ({"zero_optimization": 2}, ["object"]),
        ("[1]", ["JSON object"]),
        ('{"a": }', ["line 1", "not valid JSON"]),
    ],
)
def test_deepspeed_json_that_fights_the_configuration(tmp_path, content, words):
    with pytest.raises(UserError) as caught:
        settings(tmp_path, content)
    for word in words:
        assert word in str(caught.value)


def test_bf16_needs_a_master_copy(tmp_path):
    with pytest.raises(UserError, match="stage 1, 2 or 3"):
        settings(tmp_path, {}, model=Model(dtype="bf16"))


def test_a_missing_deepspeed_json_lists_the_shipped_ones():
    with pytest.raises(UserError, match=r"ds_configs/zero3\.json"):
        deepspeed_config.load(Config(deepspeed="ds_configs/zero9.json"))


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3", "offload"])
def test_shipped_deepspeed_files_hold_nothing_of_ours(name):
    assert deepspeed_config.load(Config(deepspeed=f"ds_configs/{name}.json"))


def test_another_draw_takes_others_first():
    first = sample(3, 0, 20, 5)
    second = sample(3, 0, 20, 5, [first])
    third = sample(3, 0, 20, 5, [first, second])
    assert len({*first, *second, *third}) == 15 and second == sorted(second)
    assert sample(3, 0, 20, 5, [first]) == second
    everyone = sample(3, 0, 7, 5, [sample(3, 0, 7, 5)])
    assert len(set(everyone)) == 5 and set(range(7)) - set(sample(3, 0, 7, 5)) <= set(everyone)
