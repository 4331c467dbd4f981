# SPDX-License-Identifier: MIT
"""Multi-head attention against the textbook: explicit heads, explicit softmax."""

import pytest
import torch

from ablab.tensor.stage import Ctx
from tests.blocks import dense, network, perturbed


@pytest.mark.parametrize("tied", [False, True])
def test_host_equals_explicit_attention(tied):
    net = perturbed(network(ATTN_MHA_TIE_KV=tied).double())
    attn, D, H, T = net.blocks[0].attn, 32, 4, 11
    x = torch.randn(2, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w, b = attn.project.qkv.weight, attn.project.qkv.bias
    q, k, v = (  # head h is rows 8 h .. 8 h + 7 of its third
        torch.stack([x @ w[i * D + h * 8 :][:8].T + b[i * D + h * 8 :][:8] for h in range(H)], 1)
        for i in ((0, 1, 1) if tied else range(3))
    )
    o, _ = dense([(q, k, "causal", 0)], v, 8**-0.5)
    want = torch.cat([o[:, h] for h in range(H)], -1) @ attn.out.weight.T + attn.out.bias
    got, _ = attn(x, Ctx())
    assert (got - want).abs().max() < 1e-12


@pytest.mark.parametrize("tied", [False, True])
def test_cache_holds_each_field_once(tied):
    facts = network(ATTN_MHA_TIE_KV=tied).facts()
    assert facts["kv_bytes_per_token"] == 2 * 3 * (1 if tied else 2) * 32  # bf16, 3 blocks, fields of width 32


def test_tying_saves_a_quarter_of_the_projector():
    sizes = {"MODEL_GPT_LAYERS": 12, "MODEL_GPT_HEADS": 12, "MODEL_GPT_EMBED": 768}
    with torch.device("meta"):
        plain, tied = (network(**sizes, ATTN_MHA_TIE_KV=t) for t in (False, True))
    n, m = (sum(p.numel() for p in net.parameters()) for net in (plain, tied))
    assert n - m == 12 * (768 * 768 + 768) == 7_087_104
