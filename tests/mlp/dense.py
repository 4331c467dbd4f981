# SPDX-License-Identifier: MIT
"""GPT-2 by explicit T x T attention from the tensors of a network, with places where a test writes its mechanism.

B batch, T tokens, D model, H heads, K key dim, F hidden.
"""

import torch
import torch.nn.functional as F

from tests.blocks import assemble, values


def build(*, symbols=(), latent=0, seed=1, **typed):
    """The test model with MLP members on; with `latent` on the stand-in projector of conftest."""
    got = values(**({"ATTN_MLA": True} if latent else {}), **dict.fromkeys(symbols, True), **typed)
    return assemble(
        got | ({"ATTN_MLA": False, "ATTN_STAND": True, "ATTN_STAND_LATENT": latent} if latent else {}), seed
    )


def qkv(p, x_BTD, n_head):
    """q, k, v of ATTN_MHA, BHTK."""
    rows = x_BTD @ p["attn.project.qkv.weight"].T + p["attn.project.qkv.bias"]
    return [t.unflatten(-1, (n_head, -1)).transpose(1, 2) for t in rows.chunk(3, -1)]


def logits(net, x_BT, project=qkv, head=None, pre=None, hidden=None):
    """`head(layer, p, o_BHTK)`, `pre(layer, p, pre_BTF, y_BTD)` and `hidden(layer, p, h_BTF, s_BHTT)` return what they
    make of their value; p are the tensors of the block by name, s the logits of attention."""
    H, T = net.dims.n_head, x_BT.shape[1]
    seen = torch.ones(T, T).tril().bool()
    x = net.wte.weight[x_BT] + net.wpe.weight[:T]
    for layer, block in enumerate(net.blocks):
        p = dict(block.named_parameters())
        q, k, v = project(p, F.layer_norm(x, x.shape[-1:], p["ln1.weight"], p["ln1.bias"]), H)
        s_BHTT = (q @ k.mT / net.dims.head_dim**0.5).masked_fill(~seen, -torch.inf)
        o = s_BHTT.softmax(-1) @ v
        o = head(layer, p, o) if head else o
        y = o.transpose(1, 2).flatten(2) @ p["attn.out.weight"].T + p["attn.out.bias"]
        x = x + y
        z = F.layer_norm(x, x.shape[-1:], p["ln2.weight"], p["ln2.bias"]) @ p["mlp.up.weight"].T + p["mlp.up.bias"]
        h = F.gelu(pre(layer, p, z, y) if pre else z)
        h = hidden(layer, p, h, s_BHTT) if hidden else h
        x = x + h @ p["mlp.down.weight"].T + p["mlp.down.bias"]
    return F.layer_norm(x, x.shape[-1:], net.ln_f.weight, net.ln_f.bias) @ net.wte.weight.T


def assert_equal(net, x_BT, want):
    """Logits, and gradients of all parameters."""
    got = net(x_BT).logits
    assert (got - want).abs().max() < 1e-11
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(3), dtype=got.dtype)
    params = list(net.parameters())
    pairs = [torch.autograd.grad((t * weight).sum(), params, materialize_grads=True) for t in (got, want)]
    for (name, _), a, b in zip(net.named_parameters(), *pairs, strict=True):
        assert (a - b).abs().max() < 1e-9 and b.any(), name
