# SPDX-License-Identifier: MIT
"""Random walks against powers of the dense attention matrix."""

import pytest
import torch

from ablab import config
from ablab.attention.rwr import Walk
from ablab.tensor.attend import attend
from ablab.tensor.stage import Ctx, Field, Gauges
from tests.attention.calls import DIMS, B, H, K, Kernels, T, assert_same, context, fold, heads, leaves, random, rows
from tests.blocks import network, values

ALPHA = 0.2


class Zee:
    """A type of side channel."""


def walk(hops):
    part = Walk(DIMS, ALPHA, hops).double()
    part.symbol = "ATTN_RWR"
    with torch.no_grad():
        part.beta.copy_(random(H, seed=8))
    return part


def dense(p, v, hops):
    """sum over t <= hops of a (1 - a)^t P^t v."""
    return sum(ALPHA * (1 - ALPHA) ** t * torch.linalg.matrix_power(p, t) @ v for t in range(hops + 1))


@pytest.mark.parametrize("lam", [0.25, 1.0])
@pytest.mark.parametrize("hops", [2, 3, 5])
def test_the_walk_is_a_sum_of_matrix_powers(hops, lam):
    q, k, v = leaves(*3 * [(B, H, T, K)])
    part, h, gauges = walk(hops), heads(q, k, v), Gauges()
    m = part(attend(h, Ctx())[0], h, context(lam).put(gauges))
    p = rows(K**-0.5 * q @ k.mT)
    term = lam * part.beta[:, None, None] * dense(p, v, hops)
    assert_same(m.y_BHTV, p @ v + term, [q, k, v, part.beta])
    share = (term.square().mean() / (p @ v).square().mean()).sqrt()
    assert abs(gauges.values["attn/0/rwr_share"] - share) < 1e-10
    assert abs(gauges.values["attn/0/rwr_beta"] - part.beta.mean()) < 1e-12


@pytest.mark.parametrize("hops", [2, 7])
def test_mass_of_a_row_is_what_the_hops_leave(hops):
    q, k, _ = leaves(*3 * [(B, H, T, K)])
    part, h = walk(hops), heads(q, k, torch.ones(B, H, T, K, dtype=torch.float64))
    m = part(attend(h, Ctx())[0], h, context())
    mass = 1 + part.beta * (1 - (1 - ALPHA) ** (hops + 1))
    assert (m.y_BHTV - mass[:, None, None]).abs().max() < 1e-12


def test_cache_holds_walk_states_beside_keys_and_values():
    net = network(ATTN_RWR=True, ATTN_RWR_HOPS=3)
    assert net.facts()["kv_bytes_per_token"] == 2 * 3 * 32 * (2 + 2)  # bf16, 3 blocks


def test_it_walks_on_the_reciprocal_matrix_in_a_band():
    q, k, v = leaves(*3 * [(B, H, T, K)])
    part, ra = walk(3), fold(7)
    h = ra(heads(q, k, v), context())
    m = part(attend(h, Ctx())[0], h, context())
    s, near = q @ k.mT, torch.arange(T)[:, None] - torch.arange(T) <= 7
    p = rows(K**-0.5 * (s + torch.where(near, ra.w_r[:, None, None] * s.mT, 0.0)))
    assert_same(m.y_BHTV, p @ v + part.beta[:, None, None] * dense(p, v, 3), [q, k, v, ra.w_r, part.beta])


def test_hops_are_plain_calls_without_lse_and_side_channels():
    q, k, v = leaves(*3 * [(B, H, T, K)])
    h = heads(q, k, v)._replace(side={Zee: Field("z", random(B, H, T, 3))})
    m, _ = attend(h, Ctx(), lse=True)
    with Kernels() as seen:
        after = walk(4)(m, h, context())
    assert seen.calls == [("flash_attention_for_cpu", K, K)] * 3  # an lse, or z, would make them wider
    assert after.side is m.side and after.lse_BHT is m.lse_BHT


def test_flops_are_those_of_the_further_calls():
    (member,) = [m for m in config.create("ATTN", values(ATTN_RWR=True)) if m.symbol == "ATTN_RWR"]
    (part,) = member.parts(DIMS)
    q, k, v = leaves(*3 * [(B, H, T, K)])
    with Kernels() as seen:
        part.double()(attend(heads(q, k, v), Ctx())[0], heads(q, k, v), context())
    assert member.flops(DIMS, T) == sum(2 * T * H * (dq + dv) for _, dq, dv in seen.calls[1:])
