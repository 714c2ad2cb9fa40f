"""What the server makes of LoRA factors, against dense matrices; the gain of Delta-LoRA."""

import itertools
import re

import pytest
import torch
from torch import nn

from hpcfed import model, registry
from hpcfed.adapters.factors import matrices
from hpcfed.adapters.layout import HEAD, AdapterLayout
from hpcfed.adapters.residual import _enter, _leave
from hpcfed.errors import UserError
from hpcfed.policies.sharing import Sharing
from hpcfed.round import Round
from hpcfed.rounds.preflight import check_options
from hpcfed.server.factors import Sent, cut
from hpcfed.settings.config import Adapter, Aggregation, Config
from hpcfed.settings.resolve import resolve
from tests import models

RANK, INPUTS, OUTPUTS, RESIDUAL = 3, 7, 6, 6
RULES = ("fedex", "flora", "flexlora", "fair", "delta")


def layout(residual):
    shapes = {"lora_A": (RANK, INPUTS), "lora_B": (OUTPUTS, RANK)}
    if residual:
        shapes |= {"residual_U": (OUTPUTS, residual), "residual_V": (residual, INPUTS)}
    return AdapterLayout.build(
        [(HEAD, "weight", "head.weight", (2, INPUTS), None)]
        + [
            (block, role[-1], f"{block}.{matrix}.{role}.weight", shape, None)
            for block, matrix in itertools.product("01", "qv")
            for role, shape in shapes.items()
        ]
    )


def rounds(own):
    split = Sharing(registry.SHARING["layers"], own).split(2, False, own.blocks)
    return Round(2, False, (0,), split)


def products(own, vector):
    """B A and U V of each matrix."""
    found = []
    for matrix in matrices(own):
        a, b = (vector[e.values].view(e.shape) for e in (matrix.a, matrix.b))
        added = torch.zeros(OUTPUTS, INPUTS, dtype=vector.dtype)
        if matrix.u is not None and matrix.v is not None:
            u, v = (vector[e.values].view(e.shape) for e in (matrix.u, matrix.v))
            added = u @ v
        found.append((b @ a, added))
    return found


def aggregate(rule, residual=RESIDUAL, clients=4, delta=0.0, alike=False, seed=0):
    """Layout, values before (with the clients' mean), each client's share and values, values after,
    what was lost."""
    own = layout(residual if rule in ("fedex", "flora", "delta") else 0)
    adapter = Adapter(rank=RANK, residual=residual, delta=delta)
    config = Config(seed=7, adapter=adapter, aggregation=Aggregation(rule=rule))
    acting = registry.AGGREGATIONS[rule](config, own)
    stream = torch.Generator().manual_seed(seed)
    before = torch.randn(own.size, generator=stream)
    every = [torch.randn(own.size, generator=stream) for _ in range(clients)]
    if alike:
        every = [every[0]] * clients
    weights = [3, 1, 4, 2, 6, 5][:clients]
    mean = sum(w * v.double() for w, v in zip(weights, every, strict=True)) / sum(weights)
    trained = own.trained.mask()
    assert isinstance(mean, torch.Tensor)
    before = torch.where(trained, mean.float(), before)
    sent = [Sent(w, acting.part.pack(v)) for w, v in zip(weights, every, strict=True)]
    after, lost = acting.next(before, sent, rounds(own), torch.zeros(0))
    shares = [(w / sum(weights), v.double()) for w, v in zip(weights, every, strict=True)]
    return own, before.double(), shares, after.double(), lost


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("rule", ["fedex", "flora", "flexlora", "fair", "delta"])
def test_what_is_added_to_a_weight(rule, alike):
    """And where all clients agree, every method comes to the plain mean's product."""
    delta = 0.5 if rule == "delta" else 0.0
    own, before, shares, after, lost = aggregate(rule, delta=delta, alike=alike)
    each = [products(own, v) for _, v in shares]
    for number, ((ba, uv), (new, moved)) in enumerate(
        zip(products(own, before), products(own, after), strict=True)
    ):
        ideal = sum(p * found[number][0] for (p, _), found in zip(shares, each, strict=True))
        assert isinstance(ideal, torch.Tensor)
        assert alike == torch.allclose(ideal, ba, atol=1e-4)
        if rule == "fedex":
            assert torch.allclose(new + moved, uv + ideal, atol=1e-5)
            assert torch.allclose(new, ba, atol=1e-5)
        elif rule == "delta":  # the forward pass has (1 + delta) B A beside the residual
            weight = uv + delta * ba  # before, the clients' mean has entered; then the products
            assert torch.allclose(moved + delta * new, weight + delta * (ideal - ba), atol=1e-5)
        elif rule == "flora":
            assert torch.allclose(moved, uv + ideal, atol=1e-5) and not new.any()
        elif rule == "flexlora":
            u, s, v = torch.linalg.svd(ideal)
            best = u[:, :RANK] @ s[:RANK].diag() @ v[:RANK]
            assert torch.allclose(new, best, atol=1e-5)
        elif alike:
            assert torch.allclose(new, ideal, atol=1e-4)
        else:
            assert (new - ideal).norm() < 0.98 * (ba - ideal).norm()
    assert lost < 1e-6


def test_flexlora_keeps_a_where_there_is_nothing():
    """One client of rank 1: of three ranks two are free, and can still learn."""
    own = layout(0)
    config = Config(adapter=Adapter(rank=RANK), aggregation=Aggregation(rule="flexlora"))
    rule = registry.AGGREGATIONS["flexlora"](config, own)
    values = torch.randn(own.size, generator=torch.Generator().manual_seed(1))
    one = values.clone()
    for matrix in matrices(own):
        one[matrix.a.values].view(matrix.a.shape)[1:] = 0
        one[matrix.b.values].view(matrix.b.shape)[:, 1:] = 0
    after, _ = rule.next(values, [Sent(2, rule.part.pack(one))], rounds(own), torch.zeros(0))
    for (new, _), (wanted, _) in zip(products(own, after), products(own, one), strict=True):
        assert torch.allclose(new, wanted, atol=1e-5)
    for matrix in matrices(own):
        a, kept = (v[matrix.a.values].view(matrix.a.shape) for v in (after, values))
        assert torch.equal(a[1:], kept[1:]) and not torch.equal(a[0], kept[0])
        assert not after[matrix.b.values].view(matrix.b.shape)[:, 1:].any()


def test_what_a_residual_of_low_rank_loses():
    own, before, shares, after, lost = aggregate("flora", residual=2)
    whole, kept = 0.0, 0.0
    for number, (_, moved) in enumerate(products(own, after)):
        ideal = sum(p * products(own, v)[number][0] for p, v in shares)
        wanted = ideal + products(own, before)[number][1]
        s = torch.linalg.svdvals(wanted)
        whole += float(s.square().sum())
        kept += float(s[:2].square().sum())
        assert float((moved - wanted).norm()) == pytest.approx(float(s[2:].norm()), rel=1e-5)
    assert lost == pytest.approx((1 - kept / whole) ** 0.5, rel=1e-5) and lost > 0.05


def test_nothing_sent_but_the_head():
    """Factors and residual of zero, as a client that learns nothing would send."""
    for rule in RULES:
        own = layout(RESIDUAL if rule in ("fedex", "flora", "delta") else 0)
        config = Config(adapter=Adapter(rank=RANK), aggregation=Aggregation(rule=rule))
        acting = registry.AGGREGATIONS[rule](config, own)
        zeros = torch.zeros(own.size)
        after, lost = acting.next(
            zeros, [Sent(1, acting.part.pack(zeros))], rounds(own), torch.zeros(0)
        )
        assert torch.isfinite(after).all() and lost == 0
        assert not any(new.any() or moved.any() for new, moved in products(own, after))


def test_the_cut_is_the_svd_with_signs_of_its_own():
    stream = torch.Generator().manual_seed(3)
    lefts = [torch.randn(6, r, generator=stream, dtype=torch.float64) for r in (2, 1)]
    rights = [torch.randn(r, 7, generator=stream, dtype=torch.float64) for r in (2, 1)]
    left, right, s = cut(lefts, rights)
    product = torch.cat(lefts, 1) @ torch.cat(rights)
    assert torch.allclose(left @ right, product)
    assert torch.allclose(s, torch.linalg.svdvals(product)[:3])
    assert (left.gather(0, left.abs().argmax(0, keepdim=True)) > 0).all()
    turned = cut([-own for own in lefts], [-own for own in rights])
    assert all(torch.allclose(a, b) for a, b in zip(turned, (left, right, s), strict=True))


def test_the_gain_is_that_of_a_backbone_that_follows():
    """Against a dense weight that has moved by delta B A, of which autograd knows nothing."""
    torch.manual_seed(0)
    down, up = (nn.Linear(*shape, bias=False).double() for shape in ((5, 2), (2, 4)))
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    delta = 0.7
    moved = (delta * up.weight @ down.weight).detach()
    wanted = torch.nn.functional.linear(x, moved) + up(down(x))
    leaves = (x, down.weight, up.weight)
    gradients = torch.autograd.grad((wanted**3).sum(), leaves)
    entering = _enter(1 + delta, down, (x,))
    got = _leave(delta, up, None, up(down(*entering)))
    assert torch.allclose(got, wanted)
    for one, other in zip(torch.autograd.grad((got**3).sum(), leaves), gradients, strict=True):
        assert torch.allclose(one, other)


def test_the_residual_is_the_servers_and_no_client_trains_it(tmp_path):
    folder = models.save("bert", tmp_path / "model")
    config = resolve("fedex-lora", [f"model.name={folder}", "adapter.residual=5"]).config
    own = model.outline(config, ("a", "b"), 0).layout
    assert own.residual.size == 6 * 5 * 64 and own.trained.size == 6 * 8 * 64 + 2 * 33
    split = Sharing(registry.SHARING["layers"], own).split(0, False, own.blocks)
    assert split.shared == own.trained and split.frozen == split.fetched == own.residual
    warm = Sharing(registry.SHARING["layers"], own).split(0, True, own.blocks)
    assert warm.frozen == own.residual and not warm.fetched
    plain = model.outline(resolve("lora-fedavg", [f"model.name={folder}"]).config, ("a", "b"), 0)
    assert not plain.layout.residual and plain.layout.trained == plain.layout.whole


@pytest.mark.parametrize(
    ("preset", "words", "told"),
    [
        ("fedex-lora", ["adapter.residual=0"], ["fedex", "adapter.residual", "64"]),
        ("flora", ["adapter.kind=prefix"], ["flora", "adapter.kind=lora"]),
        ("flora", ["sharing.rule=ffa"], ["flora", "sharing.rule=layers"]),
        ("flexlora", ["layers.score=last"], ["flexlora", "layers.score=all"]),
        ("lora-fair", ["server.optimizer=momentum"], ["fair", "server.optimizer=mean"]),
        ("lora-fair", ["local.control=true", "local.optimizer=sgd"], ["fair", "local.control"]),
        ("fedex-lora", ["updates.transforms=[hetlora]"], ["fedex", "hetlora"]),
        ("fedex-lora", ["updates.transforms=[ranks]"], ["fedex", "(ranks)"]),
        ("flexlora", ["local.moments=keep"], ["flexlora", "local.moments=keep"]),
        ("flexlora", ["updates.least_rank=9"], ["ranks", "(9)", "adapter.rank (8)"]),
        ("fedex-lora", ["adapter.start=somewhere"], ["fedex", "adapter.start"]),
        ("delta-lora", ["adapter.dropout=0.1"], ["delta", "adapter.dropout=0"]),
        ("delta-lora", ["adapter.delta=0"], ["delta", "adapter.delta above 0"]),
        ("delta-lora", ["curriculum.warmup=1"], ["delta", "curriculum.warmup=0"]),
        ("lora-fedavg", ["adapter.residual=4"], ["no effect", "aggregation.rule is fedex"]),
        ("fedex-lora", ["adapter.delta=0.5"], ["no effect", "aggregation.rule is delta"]),
        ("fedex-lora", ["aggregation.ridge=0.5"], ["no effect", "aggregation.rule is fair"]),
    ],
)  # fmt: skip
def test_what_cannot_act_is_refused_in_one_sentence(preset, words, told):
    with pytest.raises(UserError) as caught:
        check_options(resolve(preset, words), 1)
    said = str(caught.value)
    for word in told:
        assert word in said
    assert said.endswith(".") and not re.search(r"\.\s", said)
