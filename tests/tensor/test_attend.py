# SPDX-License-Identifier: MIT
"""attend: values, lse and gradients of every path against an explicit T x T softmax, which it never forms."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ablab.tensor.attend import attend
from ablab.tensor.kernel import KERNELS, chunked, fused
from ablab.tensor.stage import CAUSAL, Ctx, Factors, Field, Heads, Past, Piece, Region
from tests.blocks import dense

B, H, T, K = 2, 3, 40, 8
SCALE = 0.37  # not 1 / sqrt(K): the scale is passed, never guessed


class Zee:
    """A type of side channel."""


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(T=T, width=K, side=0, n_key=H):
    shapes = {"q": (B, H, T, width), "k": (B, n_key, T, width), "v": (B, H, T, K), "q2": (B, H, T, K)}
    shapes |= {"k2": (B, H, T, K)} | ({"z": (B, H, T, side)} if side else {})
    return {n: random(*s, seed=i).requires_grad_() for i, (n, s) in enumerate(shapes.items())}


def heads(t, regions=(CAUSAL,)):
    keys = [(t["q"], t["k"]), (t["q2"], t["k2"])]
    pieces = tuple(Piece(q, (Field(f"k{n}", k),), r) for n, ((q, k), r) in enumerate(zip(keys, regions, strict=False)))
    side = {Zee: Field("z", t["z"])} if "z" in t else {}
    return Heads(t["q"], t["k"], t["v"], SCALE, pieces, Field("v", t["v"]), side)


def reference(t, regions=(CAUSAL,)):
    keys = [(t["q"], t["k"]), (t["q2"], t["k2"])]
    pieces = [(q, k, *r) for (q, k), r in zip(keys, regions, strict=False)]
    v = torch.cat([t["v"], t["z"]], -1) if "z" in t else t["v"]
    return dense(pieces, v, SCALE)


def gradients(outputs, t):
    """Gradients of a fixed random functional of all outputs; 0 for what has no part in them."""
    total = sum((o * random(*o.shape, seed=50 + i)).sum() for i, o in enumerate(outputs))
    unused = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
    return torch.autograd.grad(total, list(t.values()), **unused)


def assert_equal(got, want, t, tolerance=1e-9):
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() < tolerance
    for a, b in zip(gradients(got, t), gradients(want, t), strict=True):
        assert (a - b).abs().max() < tolerance


@pytest.mark.parametrize("n_key", [1, H])
@pytest.mark.parametrize("side", [0, 5])
@pytest.mark.parametrize("width", [K, 2 * K, K - 3])
def test_one_causal_piece_equals_dense_attention(width, side, n_key):
    t = inputs(width=width, side=side, n_key=n_key)
    m, _ = attend(heads(t), Ctx())
    assert m.lse_BHT is None and m.n_T is None
    got = torch.cat([m.y_BHTV, *m.side.values()], -1)
    assert_equal([got], [reference(t)[0]], t)


@pytest.mark.parametrize("side", [0, 5])
@pytest.mark.parametrize("width", [K, 2 * K, K + 3])
def test_lse_is_exact_and_differentiable(width, side):
    t = inputs(width=width, side=side)
    m, _ = attend(heads(t), Ctx(), lse=True)
    got = torch.cat([m.y_BHTV, *m.side.values()], -1)
    assert_equal([got, m.lse_BHT], reference(t), t)
    assert m.n_T.tolist() == list(range(1, T + 1))


@pytest.mark.parametrize("W", [1, 4, 7, T // 2, T - 2, T - 1, T, T + 15])
def test_band_and_far_with_logits_of_their_own_make_one_softmax(W):
    t = inputs(width=2 * K, side=2)
    regions = (Region("band", W), Region("far", W))
    m, _ = attend(heads(t, regions), Ctx(), lse=True)
    got = torch.cat([m.y_BHTV, *m.side.values()], -1)
    assert_equal([got, m.lse_BHT], reference(t, regions), t)


def test_the_raw_kernel_would_drop_the_gradient_of_lse():
    """Negative control: without the autograd Function the gradient test above has something to find."""
    t = inputs()
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    _, lse = op(t["q"], t["k"], t["v"], 0.0, True, scale=SCALE)
    assert not lse.requires_grad


@pytest.mark.parametrize("core", [chunked, fused(KERNELS["cpu"])], ids=["chunked", "cpu"])
@pytest.mark.parametrize("masked", [False, True])
def test_every_core_equals_dense_attention(core, masked):
    length = 300  # more than two chunks
    q, k, v = (random(1, 2, length, K, seed=i) for i in range(3))
    t = {n: x.requires_grad_() for n, x in zip("qkv", (q, k, v), strict=True)}
    mask, kind = None, ("causal", 0)
    if masked:
        i, j = torch.arange(length)[:, None], torch.arange(length)
        mask = torch.zeros(length, length, dtype=torch.float64)
        mask.masked_fill_((j > i) | (j < i - 9), -torch.inf)
        kind = ("band", 9)
    o, lse = core(q, k, v, mask, SCALE)
    want, want_lse = dense([(q, k, *kind)], v, SCALE)
    for pick in (slice(2), slice(1), slice(1, 2)):  # gradients through both, o alone, lse alone
        assert_equal([o, lse][pick], [want, want_lse][pick], t)


class Shapes(TorchDispatchMode):
    """Records outputs with two axes of at least `limit`."""

    def __init__(self, limit):
        super().__init__()
        self.limit, self.square = limit, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor) and sum(n >= self.limit for n in t.shape) >= 2:
                self.square.append(str(func))
        return out


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("regions", [(CAUSAL,), (Region("band", 16), Region("far", 16))])
def test_no_op_forms_a_square(regions, lse):
    t = inputs(T=257)
    with Shapes(257) as seen:
        m, _ = attend(heads(t, regions), Ctx(), lse=lse)
        m.y_BHTV.sum().backward()
    assert seen.square == []


def test_the_square_detector_sees_dense_attention():
    t = inputs(T=257)
    with Shapes(257) as seen:
        reference(t)
    assert seen.square


@pytest.mark.parametrize("regions", [(CAUSAL,), (Region("band", 6), Region("far", 6))])
def test_decode_from_the_cache_equals_the_full_pass(regions):
    t = {n: x.detach() for n, x in inputs(side=3).items()}
    full, _ = attend(heads(t, regions), Ctx(), lse=True)
    past, rows = Past(T), []
    for start, end in [(0, 9), (9, 10), (10, 13), *[(n, n + 1) for n in range(13, T)]]:
        part = {n: x[:, :, start:end] for n, x in t.items()}
        m, _ = attend(heads(part, regions), Ctx(start=start).put(past), lse=True)
        rows.append(m)
        assert m.n_T.tolist() == list(range(start + 1, end + 1))
    assert (torch.cat([m.y_BHTV for m in rows], 2) - full.y_BHTV).abs().max() < 1e-10
    assert (torch.cat([m.side[Zee] for m in rows], 2) - full.side[Zee]).abs().max() < 1e-10
    assert (torch.cat([m.lse_BHT for m in rows], 2) - full.lse_BHT).abs().max() < 1e-10


def test_a_tied_field_is_cached_once():
    t = {n: x.detach() for n, x in inputs().items()}
    h = heads(t)._replace(value=Field("k0", t["k"]))
    past = Past(T)
    attend(h, Ctx().put(past))
    assert past.values_per_token() == H * K


FORMS = ["own", "shared", "latent", "latent shared"]


def field(name, form, seed, L=5):
    """A field of K channels for each head, and the same written out for all heads."""
    if "latent" not in form:
        t = random(B, 1 if form == "shared" else H, T, K, seed=seed)
        return Field(name, t), t.expand(B, H, T, K)
    c, up = random(B, 1, T, L, seed=seed), random(1 if "shared" in form else H, L, K, seed=seed + 1)
    full = (c @ up).expand(B, H, T, K)
    return Field(name, full, Factors(c, up)), full


def cut(f, start, end):
    low = f.factors and f.factors._replace(c_BHTL=f.factors.c_BHTL[:, :, start:end])
    return Field(f.name, f.new_BHTC[:, :, start:end], low)


@pytest.mark.parametrize("regions", [(CAUSAL,), (Region("band", 6), Region("far", 6))])
@pytest.mark.parametrize("one", FORMS)
@pytest.mark.parametrize("two", FORMS)
def test_decode_of_any_mix_of_fields_equals_dense_attention(one, two, regions):
    """Keys in two parts, values and a side channel: of each head, shared by heads, from a latent."""
    q = random(B, H, T, 2 * K)
    names = {"k1": one, "k2": two, "v": two, "z": one}
    made = {n: field(n, form, 10 * i) for i, (n, form) in enumerate(names.items())}
    k, v = (torch.cat([made[n][1] for n in pair], -1) for pair in (("k1", "k2"), ("v", "z")))
    want, want_lse = dense([(q, k, *r) for r in regions], v, SCALE)
    past, rows = Past(T), []
    for start, end in [(0, 9), (9, 10), (10, 13), *[(n, n + 1) for n in range(13, T)]]:
        f = {n: cut(f, start, end) for n, (f, _) in made.items()}
        part, tensors = q[:, :, start:end], [f[n].new_BHTC for n in ("k1", "v")]
        pieces = tuple(Piece(part, (f["k1"], f["k2"]), r) for r in regions)
        h = Heads(part, *tensors, SCALE, pieces, f["v"], {Zee: f["z"]})
        rows.append(attend(h, Ctx(start=start).put(past), lse=True)[0])
    assert (torch.cat([torch.cat([m.y_BHTV, m.side[Zee]], -1) for m in rows], 2) - want).abs().max() < 1e-10
    assert (torch.cat([m.lse_BHT for m in rows], 2) - want_lse).abs().max() < 1e-10
    for n, form in names.items():
        assert past.fields[0, n].shape == (B, H if form == "own" else 1, T, 5 if "latent" in form else K)
        assert (past.extend(0, cut(made[n][0], T - 1, T), T - 1) - made[n][1]).abs().max() < 1e-12


class Fresh(TorchDispatchMode):
    """The largest output of an op that is no view of the cache."""

    def __init__(self, past):
        super().__init__()
        self.held, self.most = {t.untyped_storage().data_ptr() for t in past.fields.values()}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.held:
                self.most = max(self.most, t.numel())
        return out


@pytest.mark.parametrize("form", FORMS)
def test_a_decode_step_copies_no_field_of_the_cache(form):
    q, past = random(B, H, T, K), Past(T)
    (k, _), (v, _) = field("k", form, 0), field("v", form, 5)

    def run(start, end):
        part, keys, mixed = q[:, :, start:end], cut(k, start, end), cut(v, start, end)
        pieces = (Piece(part, (keys,), CAUSAL),)
        attend(Heads(part, keys.new_BHTC, mixed.new_BHTC, SCALE, pieces, mixed), Ctx(start=start).put(past))

    run(0, T - 1)
    with Fresh(past) as seen:
        run(T - 1, T)
    assert seen.most <= max(B * H * T, H * 5 * K)  # the probabilities; `up` laid out anew
    with Fresh(past) as seen:  # negative control: what a plain matmul does
        q[:, :, -1:] @ past.extend(0, cut(k, T - 1, T), T - 1).mT
    assert form == "own" or seen.most >= B * H * T * K


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch 2.13 warns at itself
@pytest.mark.parametrize("regions", [(CAUSAL,), (Region("band", 6), Region("far", 6))])
def test_compiled_equals_eager(regions):
    t = inputs()

    def run(q, k, v, q2, k2):
        part = {"q": q, "k": k, "v": v, "q2": q2, "k2": k2}
        m, _ = attend(heads(part, regions), Ctx(), lse=True)
        return m.y_BHTV, m.lse_BHT

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(*t.values()), run(*t.values()), t, 1e-12)


def test_fp32_error_is_that_of_the_kernel():
    t = {n: x.detach() for n, x in inputs(T=512).items()}
    single = {n: x.float() for n, x in t.items()}
    regions = (Region("band", 64), Region("far", 64))
    m, _ = attend(heads(single, regions), Ctx(), lse=True)
    o, lse = reference(t, regions)
    assert m.lse_BHT.dtype == torch.float32
    assert (m.lse_BHT - lse).abs().max() < 1e-5 and (m.y_BHTV - o).abs().max() < 1e-5


@pytest.mark.parametrize("core", [chunked, fused(KERNELS["cpu"])])
def test_lse_of_bf16_heads_is_exact_under_autocast(core):
    q, k, v = (3 * random(B, H, T, 48, seed=i).bfloat16() for i in range(3))
    _, exact = chunked(q.double(), k.double(), v.double(), None, SCALE)
    with torch.autocast("cpu", torch.bfloat16):
        o, lse = core(q, k, v, None, SCALE)
    assert o.dtype == torch.bfloat16 and (lse - exact).abs().max() < 1e-3  # logits of 50 in fp32; in bf16 0.2


def test_bf16_values_with_fp32_logits_run():
    """A gate in fp32 widens q under autocast; the kernel takes one type."""
    t = {n: x.detach().bfloat16() for n, x in inputs().items()} | {"q": inputs()["q"].detach().float()}
    m, _ = attend(heads(t), Ctx(), lse=True)
    o, lse = reference({n: x.double() for n, x in t.items()})
    assert m.y_BHTV.dtype == torch.bfloat16 and m.lse_BHT.dtype == torch.float32
    assert (m.y_BHTV - o).abs().max() < 0.05 and (m.lse_BHT - lse).abs().max() < 0.05


def test_decode_of_bf16_heads_has_the_lse_of_the_full_pass_under_autocast():
    t = {n: (3 * x.detach()).bfloat16() for n, x in inputs().items()}
    past = Past(T)
    with torch.autocast("cpu", torch.bfloat16):
        full, _ = attend(heads(t), Ctx(), lse=True)
        cut = 9
        attend(heads({n: x[:, :, :cut] for n, x in t.items()}), Ctx().put(past), lse=True)
        m, _ = attend(heads({n: x[:, :, cut:] for n, x in t.items()}), Ctx(start=cut).put(past), lse=True)
    assert (m.lse_BHT - full.lse_BHT[..., cut:]).abs().max() < 1e-3  # bf16 logits are off by 0.1
