"""A state comes back from what a commit writes; nothing else is taken for one."""

import hashlib
import json
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from hpcfed.state import (
    KINDS,
    Best,
    ClientFiles,
    PrivacyState,
    RunState,
    Seconds,
    ServerState,
    Totals,
)
from hpcfed.storage.commits import FORMAT, FormatError, Manifest, decode, encode, seal, unseal

REST = {
    "run": "07",
    "began": dict.fromkeys(("configuration", "deepspeed", "data", "tokens", "model"), ""),
    "planned": 9, "metrics": {"bytes": 12, "sha256": "00"},
    "files": {"checkpoint/round-00007.safetensors": "00", "partition.json": "00"},
}  # fmt: skip


def state():
    values = torch.arange(5.0)
    clients = {kind: ClientFiles() for kind in KINDS}
    clients["personal"] = ClientFiles({3: 6, 5: 1}, {3: 4}, {(3, 5), (5, 0)})
    return RunState(
        values=values,
        chosen=("1", "head"),
        server=ServerState(0.25, {"momentum": values * 2, "control": values * 3}),
        rounds=7,
        best=Best(4, 0.5, values),
        clients=clients,
        totals=Totals(samples=9, wire=1),
        seconds=Seconds(init=1.5, total=8.0, tail=None),
        privacy=PrivacyState(0.7, 0.25, "00"),
        agreement=(0.1, -0.3),
    )


def sealed(given):
    tensors, fields = encode(given)
    return tensors, seal({**fields, **REST})


def through_files(given):
    tensors, content = sealed(given)
    return decode(load(save(tensors)), unseal(content))


def test_everything_comes_back():
    given, found = state(), through_files(state())
    assert torch.equal(found.values, given.values)
    assert found.best is not None and torch.equal(found.best.values, given.values)
    assert found.server.vectors.keys() == given.server.vectors.keys()
    for name, vector in found.server.vectors.items():
        assert torch.equal(vector, given.server.vectors[name])
    for name in ("chosen", "rounds", "clients", "totals", "seconds", "privacy", "agreement"):
        assert getattr(given, name) == getattr(found, name), name
    assert (found.server.lr, found.best.round, found.best.score) == (0.25, 4, 0.5)
    assert set(vars(given)) == {
        "values", "best", "server", "chosen", "rounds", "clients", "totals", "seconds",
        "privacy", "agreement",
    }, "a part of the state that this test does not know"  # fmt: skip


def test_the_rest_of_the_manifest_comes_back():
    told = asdict(unseal(sealed(state())[1]))
    assert {name: told[name] for name in REST} == REST


def test_before_there_is_a_best_round():
    given = state()
    given.best = None
    assert through_files(given).best is None


def test_another_format_is_refused():
    _, content = sealed(state())
    other = json.loads(content) | {"format": 2}
    with pytest.raises(FormatError, match=f"its format is 2, and this hpcfed reads {FORMAT}"):
        unseal(json.dumps(other).encode())


def test_a_manifest_does_not_grow_with_the_clients():
    """Ten thousand clients, each with a file of each kind: 16 bytes apiece, among the tensors."""
    small, large = state(), state()
    for files in large.clients.values():
        files.current = dict.fromkeys(range(10_000), 6)
    (few, content), (many, more) = sealed(small), sealed(large)
    assert len(more) == len(content) < 2000
    assert len(save(many)) - len(save(few)) < len(KINDS) * 10_000 * 16 + 2000


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
KNOWN = json.loads(sealed(state())[1])
PLACES = [(key,) for key in KNOWN if key != "sha256"] + [
    (key, inner) for key, value in KNOWN.items() if isinstance(value, dict) for inner in value
]


def forged(tree):
    """The manifest with a checksum that is right."""
    own = {key: value for key, value in tree.items() if key != "sha256"}
    found = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
    return json.dumps({**own, "sha256": found}).encode()


def read(content):
    """The state, or the one kind of error there is."""
    tensors, _ = sealed(state())
    try:
        manifest = unseal(content)
        assert isinstance(manifest, Manifest)
        found = decode(tensors, manifest)
    except ValueError as error:
        said = str(error)
    else:
        said = ""
    if said:
        assert "\n" not in said
        return None
    assert 0 <= found.rounds <= manifest.planned
    assert all(type(value) is int and value >= 0 for value in asdict(found.totals).values())
    assert all(isinstance(block, str) for block in found.chosen)
    return found


@settings(max_examples=100, deadline=None)
@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_anything_for_a_manifest(content):
    assert read(content) is None


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(PLACES), JSON, st.sampled_from(["other", "gone", "more"]))
def test_anything_in_a_manifest(place, value, how):
    """Another value in a manifest whose checksum is right: taken for what it is, or refused."""
    tree = json.loads(json.dumps(KNOWN))
    inside = tree if len(place) == 1 else tree[place[0]]
    if how == "gone":
        del inside[place[-1]]
    elif how == "more":
        inside[f"{place[-1]} "] = value
    else:
        inside[place[-1]] = value
    assert how == "other" or place[0] == "files" or read(forged(tree)) is None
    read(forged(tree))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, len(sealed(state())[1]) - 2), st.integers(1, 255))
def test_any_byte_of_a_manifest(at, bits):
    """It is refused, or says the same: white space."""
    content = bytearray(sealed(state())[1])
    content[at] ^= bits
    found = read(bytes(content))
    assert found is None or json.loads(bytes(content)) == KNOWN
