# SPDX-License-Identifier: MIT
"""The lens against an explicit bias of the columns, alone and under reciprocal attention."""

import pytest
import torch

from ablab import build
from ablab.attention.lens import Tilt
from ablab.tensor.attend import attend
from ablab.tensor.stage import Ctx, Gauges
from tests.attention.calls import DIMS, B, H, K, T, assert_same, context, fold, heads, leaves, random, rows
from tests.blocks import network, perturbed, tokens


def tilt():
    part = Tilt(DIMS).double()
    with torch.no_grad():
        part.u.copy_(random(H, K, seed=8))
    return part


@pytest.mark.parametrize("lam", [0.0, 0.25, 1.0])
def test_each_key_gets_a_bias_of_its_own(lam):
    q, k, v = leaves(*3 * [(B, H, T, K)])
    part = tilt()
    m, _ = attend(part(heads(q, k, v), context(lam)), Ctx())
    bias_BH1T = lam * (part.u[:, None] @ k.mT)
    assert_same(m.y_BHTV, rows(K**-0.5 * (q @ k.mT + bias_BH1T)) @ v, [q, k, v, part.u])


@pytest.mark.parametrize("window", [0, 7])
def test_under_reciprocal_attention_it_stays_a_bias_of_the_columns(window):
    q, k, v = leaves(*3 * [(B, H, T, K)])
    lens, ra = tilt(), fold(window)
    m, _ = attend(ra(lens(heads(q, k, v), context()), context()), Ctx())
    s, w_s, w_r = q @ k.mT, ra.w_s[:, None, None], ra.w_r[:, None, None]
    near = (torch.arange(T)[:, None] - torch.arange(T) <= window) | (window == 0)
    mixed = w_s * (s + lens.u[:, None] @ k.mT) + torch.where(near, w_r * s.mT, 0.0)
    assert_same(m.y_BHTV, rows(K**-0.5 * mixed) @ v, [q, k, v, lens.u, ra.w_s, ra.w_r])


def test_a_copy_in_the_role_of_the_key_would_move_no_row_without_a_window():
    q, k, v = leaves(*3 * [(B, H, T, K)])
    u = tilt().u[:, None]
    same = [attend(fold(0)(h, context()), Ctx())[0].y_BHTV for h in two(q, k, v, u)]
    other = [attend(fold(7)(h, context()), Ctx())[0].y_BHTV for h in two(q, k, v, u)]
    assert (same[0] - same[1]).abs().max() < 1e-12 and (other[0] - other[1]).abs().max() > 1e-2


def two(q, k, v, u):
    h = heads(q, k, v)
    return h, h._replace(q_BHTK=q + u)


def test_it_is_the_query_bias_of_the_projector():
    biased = perturbed(network().double())
    plain = network(MODEL_GPT_BIAS=False, ATTN_LENS=True).double()
    attn, twin = biased.blocks[0].attn, plain.blocks[0].attn
    with torch.no_grad():
        attn.project.qkv.bias[32:].zero_()
        attn.out.bias.zero_()
        twin.load_state_dict(attn.state_dict(), strict=False)
        twin.score["lens"].u.copy_(attn.project.qkv.bias[:32].view(4, 8))
    x = random(2, 11, 32)
    assert (attn(x, context())[0] - twin(x, context())[0]).abs().max() < 1e-12


def test_u_does_not_decay():
    net = network(MODEL_GPT_BIAS=False, ATTN_LENS=True)
    groups = {g["name"]: {id(p) for p in g["params"]} for g in build.split(net, 0.1, True)}
    mine = [p for n, p in net.named_parameters() if n.endswith("lens.u")]
    assert len(mine) == 3 and all(p.ndim == 2 and id(p) in groups["plain"] for p in mine)


def test_gauge_is_the_norm():
    net, gauges = network(MODEL_GPT_BIAS=False, ATTN_LENS=True), Gauges()
    with torch.no_grad():
        net.blocks[1].attn.score["lens"].u.fill_(0.5)
    net.blocks[1](net.wte(tokens(1, 3)), context().put(gauges)._replace(layer=1))
    assert abs(gauges.values["attn/1/lens_norm"] - 0.5 * 32**0.5) < 1e-6
