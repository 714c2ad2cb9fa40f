"""Sharing rules, HetLoRA's masks and weights, and which compositions are refused."""

import itertools
import re

import numpy as np
import pytest
import torch

from hpcfed import registry
from hpcfed.adapters.layout import HEAD, AdapterLayout
from hpcfed.errors import UserError
from hpcfed.policies.hetlora import HetLora
from hpcfed.policies.sharing import Sharing, Split, layers
from hpcfed.policies.updates import Update
from hpcfed.round import Round
from hpcfed.rounds.preflight import check_options
from hpcfed.settings.config import Adapter, Config, Updates
from hpcfed.settings.resolve import resolve

RANK, INPUTS, OUTPUTS = 4, 6, 5


def lora(*blocks):
    """Two adapted matrices in each block, and a head."""
    factors = {"A": (RANK, INPUTS), "B": (OUTPUTS, RANK)}
    adapted = [
        (block, role, f"model.layer.{block}.{matrix}.lora_{role}.weight", shape, None)
        for block, matrix in itertools.product(blocks, ("query", "value"))
        for role, shape in factors.items()
    ]
    return AdapterLayout.build([(HEAD, "weight", "head.weight", (3, INPUTS), None), *adapted])


LAYOUT = lora("0", "1", "2")
CHOICES = [choice for size in range(4) for choice in itertools.combinations(LAYOUT.layers, size)]
# Rule -> where these are in an even round: A and B of a chosen layer, A and B of another, the head.
RULES = {
    "layers": "shared shared personal personal shared",
    "ffa": "frozen shared frozen personal shared",
    "fedsa": "shared personal personal personal shared",
    "rolora": "frozen shared personal personal shared",
    "fedalt": "shared shared personal personal shared",
    "nothing": "personal personal personal personal personal",
}


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_gives_each_value_to_one_part(rule):
    sharing = Sharing(registry.SHARING[rule], LAYOUT)
    for choice, number in itertools.product(CHOICES, range(4)):
        split = sharing.split(number, False, (*choice, HEAD))
        parts = {name: getattr(split, name) for name in ("shared", "personal", "frozen")}
        masks = torch.stack([part.mask() for part in parts.values()])
        assert bool((masks.sum(0) == 1).all())
        a, b, other_a, other_b, head = RULES[rule].split()
        if rule == "rolora" and number % 2:
            a, b = b, a
        for entry in LAYOUT.entries:
            near, far = (a, other_a) if entry.role == "A" else (b, other_b)
            wanted = head if entry.block == HEAD else near if entry.block in choice else far
            (found,) = (name for name, part in parts.items() if entry in part.entries)
            assert found == wanted, (entry.name, choice, number)
        assert split.personal == sharing.personal((*choice, HEAD))
        assert split.fetched == (split.frozen if rule == "rolora" else LAYOUT.part(()))
        assert split.phases == ((split.personal, split.shared) if rule == "fedalt" else ())
        warm = sharing.split(number, True, LAYOUT.blocks)
        assert warm == Split(LAYOUT.whole, *[LAYOUT.part(())] * 3)


def test_every_rule_of_ours_is_tested():
    parts = {name: registry.SHARING[name] for name in registry.SHARING}
    own = {name for name, rule in parts.items() if rule.__module__ == Sharing.__module__}
    assert own == set(RULES)


def test_a_rule_that_overlaps_or_leaves_out_is_refused():
    none = LAYOUT.part(())
    for shared in (LAYOUT.whole, LAYOUT.roles("A")):
        wrong = Split(shared, LAYOUT.part((HEAD,)), none, none)
        sharing = Sharing(lambda *_, split=wrong: split, LAYOUT)
        with pytest.raises(ValueError, match="each entry to one part"):
            sharing.split(0, False, LAYOUT.blocks)
        assert sharing.split(0, True, LAYOUT.blocks).shared == LAYOUT.whole


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["sharing.rule=ffa", "adapter.kind=prefix"], ["sharing.rule=ffa", "adapter.kind=lora"]),
        (["sharing.rule=fedsa", "adapter.kind=prompt"], ["sharing.rule=fedsa", "=prompt"]),
        (["sharing.rule=fedalt"], ["sharing.rule=fedalt", "choose another layers.score"]),
        (["sharing.rule=rolora", "local.moments=keep"], ["sharing.rule=rolora", "local.moments"]),
        (["sharing.rule=rolora", "local.control=true"], ["sharing.rule=rolora", "local.control"]),
        (
            ["sharing.rule=fedalt", "layers.score=last", "local.moments=keep"],
            ["sharing.rule=fedalt", "local.moments"],
        ),
        (["updates.transforms=[hetlora]", "updates.least_rank=9"], ["(9)", "adapter.rank (8)"]),
        (["updates.transforms=[hetlora]", "adapter.kind=prefix"], ["hetlora", "adapter.kind=lora"]),
        (["updates.transforms=[hetlora]", "local.control=true"], ["leave out", "local.control"]),
        (
            [
                "updates.transforms=[hetlora]", "server.optimizer=momentum", "server.control=true",
            ],
            ["updates.transforms", "server.control"],
        ),
        *(
            (["updates.transforms=[hetlora]", f"sharing.rule={rule}"], ["hetlora", f"={rule}"])
            for rule in ("ffa", "fedsa", "rolora", "nothing")
        ),
    ],
)  # fmt: skip
def test_what_cannot_act_is_refused_in_one_sentence(words, told):
    with pytest.raises(UserError) as caught:
        check_options(resolve("lora-fedavg", words), 1)
    said = str(caught.value)
    for word in told:
        assert word in said
    assert said.endswith(".") and not re.search(r"\.\s", said)


# HetLoRA.


def transform(least=1, decay=0.0):
    updates = Updates(transforms=("hetlora",), least_rank=least, rank_decay=decay)
    return HetLora(Config(seed=7, adapter=Adapter(rank=RANK), updates=updates), LAYOUT)


def update_of(rank, blocks=LAYOUT.blocks, scale=1.0, seed=0):
    """A client's update of this rank, as it was handed out and as it is; and its round."""
    split = layers(LAYOUT, 0, LAYOUT.part(blocks))
    vectors = torch.randn(2, LAYOUT.size, generator=torch.Generator().manual_seed(seed))
    vectors[1] *= scale
    vectors[1][~torch.from_numpy(first(rank))] = 0
    before, values = (split.shared.pack(vector) for vector in vectors)
    memo = {"rank": torch.tensor(rank)}
    return Update(0, before, values, 5, None, memo), Round(3, False, (0,), split)


def first(rank):
    """(size,) bool: rows of A and columns of B below the rank; and the head."""
    own = np.ones(LAYOUT.size, dtype=bool)
    for entry in LAYOUT.entries:
        for place, index in enumerate(np.ndindex(entry.shape)):
            if entry.role == "A":
                own[entry.offset + place] = index[0] < rank
            if entry.role == "B":
                own[entry.offset + place] = index[1] < rank
    return own


def pairs(packed, blocks):
    """A and B of each matrix, of what is shared of these blocks: one entry after the other."""
    found, start = {}, 0
    for entry in LAYOUT.entries:
        if entry.block in blocks:
            value = packed[start : start + entry.size].numpy().astype(np.float64)
            found[entry.name] = value.reshape(entry.shape)
            start += entry.size
    return [(a, found[n.replace("_A", "_B")]) for n, a in found.items() if "_A" in n]


def test_a_clients_rank_is_drawn_once():
    drawn = [transform().rank(client, {}) for client in range(400)]
    assert drawn == [transform(least=1, decay=0.5).rank(client, {}) for client in range(400)]
    counts = np.bincount(drawn, minlength=RANK + 1)
    assert counts[0] == 0 and len(counts) == RANK + 1 and abs(counts[1:] - 100).max() < 30
    assert {transform(least=RANK).rank(client, {}) for client in range(20)} == {RANK}
    assert transform().rank(0, {"rank": torch.tensor(2)}) == 2


@pytest.mark.parametrize("rank", range(1, RANK + 1))
def test_a_client_has_its_first_ranks(rank):
    has = transform().has(0, {"rank": torch.tensor(rank)})
    assert has is not None and np.array_equal(has.numpy(), first(rank))


@pytest.mark.parametrize("blocks", [LAYOUT.blocks, ("1", HEAD)])
@pytest.mark.parametrize("rank", [1, 3])
def test_a_client_weighs_what_its_matrices_weigh(rank, blocks):
    update, now = update_of(rank, blocks)
    sent = update.values.clone()
    transform().on_client(update, now)
    norm = sum(np.sqrt(((b @ a) ** 2).sum()) for a, b in pairs(sent, blocks))
    assert update.weight == round(norm * 2**16) > 2**16
    assert update.mask is not None
    assert np.array_equal(update.mask.numpy(), first(rank)[LAYOUT.part(blocks).mask().numpy()])
    assert torch.equal(update.values, sent), "without rank_decay nothing shrinks"
    assert update.memo == {"rank": torch.tensor(rank)}


@pytest.mark.parametrize(
    ("scale", "weight"), [(0.0, 1), (1e6, 2**28), (float("inf"), 5), (float("nan"), 5)]
)
def test_a_weight_is_a_whole_number_in_its_range(scale, weight):
    """And of an update that is not finite, which the sum refuses, it stays what it was."""
    update, now = update_of(2, scale=scale)
    transform(decay=0.5).on_client(update, now)
    assert update.weight == weight


@pytest.mark.parametrize(("scale", "kept"), [(0.5, False), (3.0, True)])
def test_a_rank_that_has_become_less_is_given_up(scale, kept):
    """Its values still count in this round."""
    rank, decay = 3, 0.25
    update, now = update_of(rank, scale=scale)
    sent, given = update.values.clone(), dict(update.memo)
    remembered = update.memo
    transform(decay=decay).on_client(update, now)
    shrunk = sent.numpy().copy()
    shrunk[first(rank) & ~first(rank - 1)] *= 1 - decay
    assert np.array_equal(update.values.numpy(), shrunk)
    before, after = (
        sum(np.linalg.norm(b[:, rank - 1]) * np.linalg.norm(a[rank - 1]) for a, b in matrices)
        for matrices in (pairs(update.before, LAYOUT.blocks), pairs(update.values, LAYOUT.blocks))
    )
    assert (after >= before) == kept
    assert int(update.memo["rank"]) == (rank if kept else rank - 1)
    assert update.mask is not None and np.array_equal(update.mask.numpy(), first(rank))
    norm = sum(np.sqrt(((b @ a) ** 2).sum()) for a, b in pairs(update.values, LAYOUT.blocks))
    assert update.weight == round(norm * 2**16)
    assert remembered == given, "the round may still fail"


def test_the_last_rank_is_never_given_up():
    update, now = update_of(1, scale=0.01)
    sent = update.values.clone()
    transform(decay=0.9).on_client(update, now)
    assert torch.equal(update.values, sent) and int(update.memo["rank"]) == 1
