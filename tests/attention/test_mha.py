# SPDX-License-Identifier: MIT
"""Multi-head attention against the textbook: explicit heads, explicit softmax."""

import torch

from ablab.tensor.stage import Ctx
from tests.blocks import dense, network, perturbed


def test_host_equals_explicit_attention():
    net = perturbed(network().double())
    attn, D, H, T = net.blocks[0].attn, 32, 4, 11
    x = torch.randn(2, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w, b = attn.project.qkv.weight, attn.project.qkv.bias
    q, k, v = (  # head h is rows 8 h .. 8 h + 7 of its third
        torch.stack([x @ w[i * D + h * 8 :][:8].T + b[i * D + h * 8 :][:8] for h in range(H)], 1) for i in range(3)
    )
    o, _ = dense([(q, k, "causal", 0)], v, 8**-0.5)
    want = torch.cat([o[:, h] for h in range(H)], -1) @ attn.out.weight.T + attn.out.bias
    got, _ = attn(x, Ctx())
    assert (got - want).abs().max() < 1e-12


def test_cache_holds_keys_and_values_once():
    assert network().facts()["kv_bytes_per_token"] == 2 * 3 * 2 * 32  # bf16, 3 blocks, k and v of width 32
