# SPDX-License-Identifier: MIT
"""Reciprocal attention against w_s S + w_r S^T, with S formed."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ablab import config
from ablab.attention.reciprocal import Fold
from ablab.tensor.attend import attend
from ablab.tensor.stage import Coupling, Ctx, Gauges
from tests.attention.calls import DIMS, B, H, K, Kernels, T, assert_same, context, heads, leaves, random, rows
from tests.blocks import network, perturbed, tokens, values
from tests.contract.test_members import ALL, LONG, assert_conforms, assert_no_square, make

WINDOWS = [1, 4, 7, T - 1, T, T + 15]


def fold(w_r, window=0):
    """Weights that differ between heads."""
    part = Fold(DIMS, w_r, True, window).double()
    with torch.no_grad():
        part.w_s.add_(random(H, seed=7), alpha=0.1)
        part.w_r.mul_(torch.arange(1, H + 1))
    return part


def dense(q, k, v, w_s, w_r, window=0, scale=K**-0.5):
    s = q @ k.mT
    mixed = w_s[:, None, None] * s + w_r[:, None, None] * s.mT
    if window:
        i, j = torch.arange(T)[:, None], torch.arange(T)
        mixed = torch.where(i - j <= window, mixed, w_s[:, None, None] * s)
    return rows(scale * mixed) @ v


@pytest.mark.parametrize("w_r", [0.3, 0.0, -0.3])
@pytest.mark.parametrize("window", [0, *WINDOWS])
def test_folded_form_equals_the_dense_mix(w_r, window):
    q, k, v = leaves(*3 * [(B, H, T, K)])
    part = fold(w_r, window)
    m, _ = attend(part(heads(q, k, v), context()), Ctx())
    want = dense(q, k, v, part.w_s, part.w_r, window)
    assert_same(m.y_BHTV, want, [q, k, v, part.w_s, part.w_r])


def test_the_default_scale_of_wide_heads_would_be_wrong():
    q, k, v = leaves(*3 * [(B, H, T, K)])
    part = fold(0.3)
    m, _ = attend(part(heads(q, k, v, (2 * K) ** -0.5), context()), Ctx())
    assert (m.y_BHTV - dense(q, k, v, part.w_s, part.w_r)).abs().max() > 1e-2


@pytest.mark.parametrize("lam", [0.0, 0.25, 1.0])
def test_coupling_moves_both_weights_from_the_host_to_theirs(lam):
    q, k, v = leaves(*3 * [(B, H, T, K)])
    part = fold(0.3)
    m, _ = attend(part(heads(q, k, v), context(lam)), Ctx())
    assert_same(m.y_BHTV, dense(q, k, v, 1 + lam * (part.w_s - 1), lam * part.w_r), [q, k, v, part.w_s, part.w_r])


@pytest.mark.parametrize("window", WINDOWS)
def test_a_band_starts_as_the_host(window):
    net = network(ATTN_RECIPROCAL=True, ATTN_RECIPROCAL_WINDOW=window).double()
    x = tokens(2, T)
    assert (net(x).logits - network().double()(x).logits).abs().max() < 1e-12


BANDED = pytest.mark.parametrize("case", ALL, ids=lambda case: f"all on {case[0]}")


@BANDED
@pytest.mark.parametrize("window", [1, 7, T - 1, T + 15])
def test_a_band_is_causal_alive_and_decodes_beside_all_that_composes_with_it(case, window):
    assert_conforms(make(*case, ATTN_RECIPROCAL_WINDOW=window), T)


@BANDED
def test_a_band_beside_all_forms_no_square(case):
    assert_no_square(make(*case, ATTN_RECIPROCAL_WINDOW=16, MODEL_GPT_BLOCK=LONG))


def test_cache_holds_queries_beside_keys_and_values():
    assert network(ATTN_RECIPROCAL=True).facts()["kv_bytes_per_token"] == 2 * 3 * 32 * (2 + 1)  # bf16, 3 blocks


def test_fixed_weights_are_no_parameters_and_leave_no_key():
    net = network(ATTN_RECIPROCAL=True, ATTN_RECIPROCAL_ALPHA='"0.3"', ATTN_RECIPROCAL_LEARN=False)
    host, x = network(), tokens(2, T)
    assert list(net.state_dict()) == list(host.state_dict())
    assert not torch.equal(net.double()(x).logits, host.double()(x).logits)
    net.lam.fill_(0.0)
    assert torch.equal(net(x).logits, host(x).logits)


class Ops(TorchDispatchMode):
    """Name and shape of what every operator returns."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.shapes.append((func.overloadpacket.__name__, tuple(getattr(out, "shape", ()))))
        return out


@pytest.mark.parametrize(("learn", "products"), [(False, 1), (True, 2)])
def test_queries_are_scaled_only_by_a_weight_that_can_differ_from_1(learn, products):
    part, (q, k, v) = Fold(DIMS, 0.3, learn, 0).double(), leaves(*[(B, H, T, K)] * 3)
    with Ops() as seen:
        part(heads(q, k, v), context(0.5))
    assert seen.shapes.count(("mul", (B, H, T, K))) == products


def test_a_fixed_weight_of_zero_is_refused():
    with pytest.raises(ValueError, match=r"CONFIG_ATTN_RECIPROCAL_ALPHA = 0 with .*LEARN = n : .* set another"):
        config.create("ATTN", values(ATTN_RECIPROCAL=True, ATTN_RECIPROCAL_LEARN=False))


def test_gauges_are_the_factors_of_the_symmetric_and_the_antisymmetric_map():
    net = perturbed(network(ATTN_RECIPROCAL=True, MODEL_GPT_BIAS=False).double())
    attn, x = net.blocks[0].attn, random(1, 11, 32)
    with torch.no_grad():
        attn.score["reciprocal"].w_s.fill_(0.9)
        attn.score["reciprocal"].w_r.fill_(-0.4)
    gauges = Gauges()
    got, _ = attn(x, context().put(gauges))
    found = {name.rpartition("reciprocal_")[2]: v for name, v in gauges.values.items()}
    wq, wk, wv = attn.project.qkv.weight.view(3, 4, 8, 32)
    m = wq.mT @ wk  # x_i M x_j
    assert (m - m.mT).abs().max() > 0.01
    both = found["sym"] * (m + m.mT) + found["anti"] * (m - m.mT)
    o = rows(8**-0.5 * x @ both @ x.mT) @ (x @ wv.mT)
    want = o.transpose(0, 1).reshape(1, 11, 32) @ attn.out.weight.T
    assert (got - want).abs().max() < 1e-12
    assert set(gauges.values) == {f"attn/0/reciprocal_{g}" for g in Fold.gauges}
    assert abs(found["w_s"] - 0.9) < 1e-12 and abs(found["w_r"] + 0.4) < 1e-12


@pytest.mark.parametrize("window", [0, 16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_flash_kernel_runs_on_double_width(window, dtype):
    length = 257
    q, k, v = (random(1, length, 2 * 64, seed=i).view(1, length, 2, 64).transpose(1, 2).to(dtype) for i in range(3))
    part = fold(0.3, window)
    part.w_s.data, part.w_r.data = part.w_s.data[:2].float(), part.w_r.data[:2].float()
    inputs = [t.requires_grad_() for t in (q, k, v)]
    with Kernels(length) as seen:
        m, _ = attend(part(heads(*inputs, 64**-0.5), Ctx().put(Coupling(torch.ones(())))), Ctx())
        m.y_BHTV.sum().backward()
    assert m.y_BHTV.shape == q.shape and m.y_BHTV.dtype == dtype
    assert seen.squares == []
    forward = [c for c in seen.calls if "backward" not in c[0]]
    backward = [c for c in seen.calls if "backward" in c[0]]
    if window:  # first rows and blocks of the band, at double width; far
        assert [c[1] for c in forward] == [128, 128, 64] and len(backward) == 3
    else:
        assert forward == [("flash_attention_for_cpu", 128, 128)]
        assert backward == [("flash_attention_for_cpu_backward", 128, 128)]


def test_values_of_another_width_would_form_a_square():
    """Negative control: what the padding of values is for."""
    q, v = random(1, 2, 257, 128).float(), random(1, 2, 257, 64).float()
    with Kernels() as seen:
        F.scaled_dot_product_attention(q, q, v, is_causal=True, scale=0.1)
    assert seen.squares and not any("flash" in name for name, *_ in seen.calls)


def clauses(net, **symbols):
    (member,) = [m for m in config.create("ATTN", values(**symbols)) if m.symbol == "ATTN_RECIPROCAL"]
    built = SimpleNamespace(model=net)
    mine = [c for c in member.contracts() if c.name.partition("/")[0] in ("params", "width", "fixed")]
    found = {c.name: c.judge(built if c.moment == "build" else SimpleNamespace(built=built)) for c in mine}
    return {name.partition("/")[0]: judged["ok"] for name, judged in found.items()}


def test_contracts_measure_width_and_fixed_weight():
    symbols = {
        "ATTN_RECIPROCAL": True,
        "ATTN_RECIPROCAL_ALPHA": '"0.3"',
        "ATTN_RECIPROCAL_LEARN": False,
        "MODEL_GPT_DROPOUT": '"0.1"',
    }
    net, state = network(**symbols), torch.get_rng_state()
    assert clauses(net, **symbols) == {"params": True, "width": True, "fixed": True}
    assert net.training and torch.equal(torch.get_rng_state(), state)
    part = net.blocks[1].attn.score["reciprocal"]
    part.w_r.fill_(0.0)
    assert not clauses(net, **symbols)["fixed"]
    part.forward = lambda h, ctx: h
    assert not clauses(net, **symbols)["width"]


@pytest.mark.parametrize(("window", "reach"), [(0, T), (7, 8), (T + 3, T)])
def test_flops_are_those_of_the_wider_queries(window, reach):
    symbols = {"ATTN_RECIPROCAL": True, "ATTN_RECIPROCAL_WINDOW": window}
    net = network(**symbols)
    (member,) = [m for m in config.create("ATTN", values(**symbols)) if m.symbol == "ATTN_RECIPROCAL"]
    h = net.blocks[0].attn.project(random(1, T, 32).float(), context())[0]
    wide = net.blocks[0].attn.score["reciprocal"](h, context()).pieces[0].q_BHTK.shape[-1] - h.q_BHTK.shape[-1]
    assert member.widens(net.dims, T) == 2 * wide * net.dims.n_head * reach
