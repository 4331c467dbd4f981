# SPDX-License-Identifier: MIT
"""Row statistics against an explicit fp64 softmax: values, gradients, precision, and no T x T."""

from functools import partial

import pytest
import torch

from ablab.tensor import kernel, rowstat
from ablab.tensor.attend import attend
from ablab.tensor.stage import CAUSAL, Ctx, Field, Heads, Past, Piece, Region
from tests.tensor.test_attend import Shapes, random

B, H, T, D, K = 2, 3, 40, 8, 5
SCALE = 0.37
STATS = {
    "entropy": rowstat.entropy,
    "power 2": partial(rowstat.power, a=2),
    "power 3": partial(rowstat.power, a=3),
    "max": partial(rowstat.mass, k=1),
    "mass": partial(rowstat.mass, k=K),
    "entropy share": rowstat.entropy_share,
    "rms share": rowstat.rms_share,
    "max share": partial(rowstat.mass_share, k=1),
    "mass share": partial(rowstat.mass_share, k=K),
}
every = pytest.mark.parametrize("stat", STATS)


@pytest.fixture(autouse=True)
def few_rows():
    """Chunks that do not divide T, and more than one."""
    before = kernel.InForce.chunk
    kernel.settle(torch.device("cpu"), 16, ())
    yield
    kernel.settle(torch.device("cpu"), before, ())


def inputs(T=T, D=D):
    shapes = {"q": (B, H, T, D), "k": (B, H, T, D - 3), "shared": (B, 1, T, 3), "q2": (B, H, T, D), "k2": (B, H, T, D)}
    return {n: random(*s, seed=i).requires_grad_() for i, (n, s) in enumerate(shapes.items())}


def heads(t, W=None):
    """One causal piece, whose key is two fields, or two pieces with logits of their own."""
    first = Piece(t["q"], (Field("k", t["k"]), Field("shared", t["shared"])), Region("band", W) if W else CAUSAL)
    second = (Piece(t["q2"], (Field("k2", t["k2"]),), Region("far", W)),) if W else ()
    return Heads(t["q"], t["k2"], t["k2"], SCALE, (first, *second), Field("v", t["k2"]))


def measure(stat, h, ctx=None):
    ctx = ctx or Ctx()
    m, ctx = attend(h, ctx, lse=True)
    return STATS[stat](m, h, ctx)


def rows(t, W=None):
    """(P, entropy of its rows) by an explicit softmax."""
    i, j = torch.arange(t["q"].shape[2])[:, None], torch.arange(t["q"].shape[2])
    k = torch.cat([t["k"], t["shared"].expand(-1, t["q"].shape[1], -1, -1)], -1)
    s = SCALE * t["q"] @ k.mT
    if W:
        s = torch.where(j < i - W, SCALE * t["q2"] @ t["k2"].mT, s)
    logp = s.masked_fill(j > i, -torch.inf).log_softmax(-1)
    p = logp.exp()
    return p, -(p * logp.masked_fill(j > i, 0.0)).sum(-1)


@pytest.mark.parametrize("W", [None, 7])
def test_watched_entropy_is_that_of_one_row_in_eight(W):
    t, seen = inputs(), rowstat.RowEntropy()
    seen.watch(heads(t, W), Ctx(layer=3))
    at = torch.tensor([39, 31, 23, 15, 7])
    share_BHN = rows(t, W)[1][:, :, at] / (at + 1).double().log()
    got = {name: v.item() for name, v in seen.watched.items()}
    wanted = {"mean": share_BHN.mean().item(), "lowest_head": share_BHN.mean((0, 2)).min().item()}
    assert got == pytest.approx({f"attn/3/entropy_{name}": v for name, v in wanted.items()}, rel=1e-12)


@pytest.mark.parametrize("T", [1, 2, 8])
def test_watched_entropy_of_short_and_of_collapsed_rows(T):
    t, seen = inputs(T), rowstat.RowEntropy()
    with torch.no_grad():
        t["k"].zero_(), t["shared"].zero_()
    seen.watch(heads(t), Ctx())
    assert list(seen.watched.values()) == pytest.approx([1.0, 1.0] if T > 1 else [], abs=1e-12)
    if T > 1:
        t["k"].data[:, :, 0], t["q"].data = 1e4, t["q"].data.abs()
        seen.watch(heads(t), Ctx())
        assert list(seen.watched.values()) == pytest.approx([0.0, 0.0], abs=1e-12)


def reference(stat, t, W=None):
    p, entropy = rows(t, W)
    n = torch.arange(1.0, p.shape[-1] + 1, dtype=p.dtype)
    largest = p.sort(-1, descending=True).values
    if stat == "entropy":
        return entropy
    if stat.startswith("power"):
        return (p ** int(stat[-1])).sum(-1)
    if stat in ("max", "mass"):
        return largest[..., : 1 if stat == "max" else K].sum(-1)
    free = K if stat == "mass share" else 1  # rows where only one value is possible
    p, entropy, largest, n = p[:, :, free:], entropy[..., free:], largest[:, :, free:], n[free:]
    found = {
        "entropy share": lambda: entropy / n.log(),
        "rms share": lambda: ((p**2).sum(-1) ** 0.5 - n**-0.5) / (1 - n**-0.5),
        "max share": lambda: (largest[..., 0] - 1 / n) / (1 - 1 / n),
        "mass share": lambda: (largest[..., :K].sum(-1) - K / n) / (1 - K / n),
    }[stat]()
    return torch.nn.functional.pad(found, (free, 0))


def gradients(out, t):
    weights = random(*out.shape, seed=50)
    return torch.autograd.grad((out * weights).sum(), list(t.values()), allow_unused=True, materialize_grads=True)


def distance(stat, W=None, **changes):
    """Largest difference of values and of gradients to the reference."""
    t = inputs()
    got, want = measure(stat, heads(t, W), **changes), reference(stat, t, W)
    pairs = zip(gradients(got, t), gradients(want, t), strict=True)
    return (got - want).abs().max().item(), max((a - b).abs().max().item() for a, b in pairs)


@every
@pytest.mark.parametrize("W", [None, 1, 4, 7, T - 1, T, T + 15])
def test_values_and_gradients_are_those_of_the_explicit_softmax(stat, W):
    assert max(distance(stat, W)) < 1e-9


@every
@pytest.mark.parametrize("W", [None, 6])
def test_without_gradients_the_values_are_the_same(stat, W):
    t = inputs()
    with torch.no_grad():
        assert (measure(stat, heads(t, W)) - reference(stat, t, W)).abs().max() < 1e-9


@every
@pytest.mark.parametrize("W", [None, 6])
def test_decode_from_the_cache_gives_the_same_rows(stat, W):
    t = {n: x.detach() for n, x in inputs().items()}
    past, found = Past(T), []
    for start, end in [(0, 9), (9, 10), (10, 33), *[(n, n + 1) for n in range(33, T)]]:
        part = {n: x[:, :, start:end] for n, x in t.items()}
        found.append(measure(stat, heads(part, W), Ctx(start=start).put(past)))
    assert (torch.cat(found, -1) - reference(stat, t, W)).abs().max() < 1e-10
    assert {name for _, name in past.fields} == {"k", "shared", "v"} | ({"k2"} if W else set())  # none of its own


@pytest.mark.parametrize("stat", ["power 2", "mass share"])
def test_a_raw_lse_loses_a_gradient(stat, monkeypatch):
    """Negative control of the gradient test: the same values with an lse that has none."""
    inner = STATS[stat]
    monkeypatch.setitem(STATS, stat, lambda m, h, ctx: inner(m._replace(lse_BHT=m.lse_BHT.detach()), h, ctx))
    values, grads = distance(stat)
    assert values < 1e-9 < 1e-3 < grads


def test_an_inverted_mask_is_seen(monkeypatch):
    """Negative control: picking among the keys that a row must not see."""
    monkeypatch.setattr(rowstat, "sees", lambda region, gap: gap < 0)
    assert distance("mass")[0] > 0.1


@every
def test_a_row_depends_on_no_later_token(stat):
    t, cut = inputs(), 23
    other = {n: torch.cat([x[:, :, :cut], x[:, :, cut:].flip(0)], 2) for n, x in t.items()}
    a, b = measure(stat, heads(t)), measure(stat, heads(other))
    assert torch.equal(a[..., :cut], b[..., :cut]) and not torch.equal(a[..., cut:], b[..., cut:])
    pooled = [x.mean(-1, keepdim=True) for x in (a, b)]  # control: a mean over T does
    assert not torch.equal(*pooled)


@pytest.mark.parametrize("W", [None, 7])
def test_bounds_hold(W):
    h = heads(inputs(), W)
    n = torch.arange(1, T + 1)
    largest, mass, square = (measure(s, h) for s in ("max", "mass", "power 2"))
    slack = 1e-12
    assert ((square / n).sqrt() <= largest + slack).all() and (largest <= square.sqrt() + slack).all()
    assert (largest <= mass + slack).all() and (mass <= (K * square).sqrt().clamp(max=1) + slack).all()
    for stat in STATS:
        if "share" in stat:
            t = measure(stat, h)
            assert (t >= -slack).all() and (t <= 1 + slack).all() and (t[..., 0] == 0).all()


@pytest.mark.parametrize("stat", ["entropy", "max", "mass", "rms"])
def test_a_share_of_uniform_rows_is_the_same_at_every_position(stat):
    t = inputs() | {"q": torch.zeros(B, H, T, D, dtype=torch.float64)}
    share = measure(f"{stat} share", heads(t))[..., K:]
    assert (share - float(stat == "entropy")).abs().max() < 1e-12
    raw = measure("power 2" if stat == "rms" else stat, heads(t))[..., K:]
    assert raw.std() > 0.01  # control: the raw statistic tells the position


def large(dtype):
    shape = 1, 2, 1024, 64
    q, k, v = (1.5 * random(*shape, seed=i).to(dtype) for i in range(3))
    full = {"q": q.double(), "k": k[..., :61].double(), "shared": k[:, :1, :, 61:].double()}
    k = torch.cat([full["k"], full["shared"].expand(-1, 2, -1, -1)], -1).to(dtype)
    h = Heads(q, k, v, 0.125, (Piece(q, (Field("k", k),), CAUSAL),), Field("v", v))
    scaled = full | {"q": full["q"] * 0.125 / SCALE}  # the reference has a scale of its own
    return h, scaled


def test_fp32_lse_is_exact_to_4e_6():
    h, full = large(torch.float32)
    p, entropy = rows(full)
    want = entropy + (
        p * SCALE * (full["q"] @ torch.cat([full["k"], full["shared"].expand(-1, 2, -1, -1)], -1).mT)
    ).sum(-1)
    assert (attend(h, Ctx(), lse=True)[0].lse_BHT - want).abs().max() < 4e-6


@pytest.mark.parametrize("stat", [s for s in STATS if "share" in s])
def test_fp32_shares_are_exact_to_1e_5(stat):
    h, full = large(torch.float32)
    got = measure(stat, h)
    assert got.dtype == torch.float32 and (got - reference(stat, full)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("stat", "bound"),
    [("entropy", 1.2e-4), ("power 2", 2.8e-4), ("max", 1.2e-4), ("mass", 1.2e-4)],
)
def test_statistics_of_bf16_heads_stay_fp32_under_autocast(stat, bound):
    h, full = large(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        got = measure(stat, h)
    assert got.dtype == torch.float32 and (got - reference(stat, full)).abs().max() < bound


def test_bf16_products_would_not_do():
    """Negative control of the bound above: the logits as autocast would give them."""
    h, full = large(torch.bfloat16)
    s = (0.125 * h.q_BHTK @ h.k_BHTK.mT).double().masked_fill(torch.ones(1024, 1024).triu(1) == 1, -torch.inf)
    assert (s.softmax(-1).amax(-1) - reference("max", full)).abs().max() > 1.2e-4


@every
@pytest.mark.parametrize("W", [None, 16])
def test_no_op_forms_a_square(stat, W):
    t = inputs(T=257)
    with Shapes(257) as seen:
        measure(stat, heads(t, W)).sum().backward()
    assert seen.square == []


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch 2.13 warns at itself
def test_compiled_equals_eager():
    t, stat = inputs(), "entropy share"  # the conformance of ATTN_RACT compiles the mass
    run = lambda *values: measure(stat, heads(dict(zip(t, values, strict=True)), 6))
    got, want = torch.compile(run, fullgraph=True, backend="aot_eager")(*t.values()), run(*t.values())
    assert (got - want).abs().max() < 1e-12
    assert max((a - b).abs().max() for a, b in zip(gradients(got, t), gradients(want, t), strict=True)) < 1e-12
    torch._dynamo.reset()
