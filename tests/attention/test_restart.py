# SPDX-License-Identifier: MIT
"""Self-restart: the diagonal that it adds to P."""

import pytest
import torch

from ablab.attention.restart import Stay
from ablab.tensor.attend import attend
from ablab.tensor.stage import Ctx, Gauges
from tests.attention.calls import DIMS, B, H, K, T, assert_same, context, heads, leaves, random, rows


@pytest.mark.parametrize("lam", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("alpha", [-0.3, 0.0, 0.4])
def test_rows_of_p_get_a_diagonal(alpha, lam):
    q, k, v = leaves(*3 * [(B, H, T, K)])
    part, gauges = Stay(DIMS, alpha).double(), Gauges()
    part.symbol = "ATTN_RESTART"
    h = heads(q, k, v)
    m, _ = part(attend(h, Ctx())[0], h, context(lam).put(gauges))
    share = (lam * part.a)[:, None, None]
    p = (1 - share) * rows(K**-0.5 * q @ k.mT) + share * torch.eye(T, dtype=torch.float64)
    assert (p.sum(-1) - 1).abs().max() < 1e-12
    assert_same(m.y_BHTV, p @ v, [q, k, v, part.a])
    assert abs(gauges.values["attn/0/restart_alpha"] - alpha) < 1e-7


def test_gradient_at_zero_is_v_minus_its_mean():
    q, k, v = leaves(*3 * [(B, H, T, K)])
    part, h, weight = Stay(DIMS, 0.0).double(), heads(q, k, v), random(B, H, T, K, seed=9)
    m, _ = part(attend(h, Ctx())[0], h, context())
    (got,) = torch.autograd.grad((m.y_BHTV * weight).sum(), [part.a])
    want = (weight * (v - rows(K**-0.5 * q @ k.mT) @ v)).sum((0, 2, 3))
    assert (got - want).abs().max() < 1e-10 and (want.abs() > 0.1).all()
