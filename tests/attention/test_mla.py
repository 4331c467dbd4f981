# SPDX-License-Identifier: MIT
"""Latent attention against explicit heads in float64: trained, and decoded from a cache of latents."""

from typing import NamedTuple

import pytest
import torch

from ablab import plugin
from ablab.attention import Attention
from ablab.model import fingerprint
from ablab.model._hf import to_hf
from ablab.tensor.stage import Ctx, Field, Gate, Gauges, Latent, LatentDelta, Past, Score
from tests.blocks import assemble, dense, network, perturbed, tokens, values

B, T, D, H, K, L = 2, 23, 32, 4, 8, 16
W_S, W_R = 0.8, -0.3
FORMS = [
    {},
    {"TIE_KV": True},
    {"PER_HEAD_K": False},
    {"PER_HEAD_V": False},
    {"PER_HEAD_K": False, "PER_HEAD_V": False, "TIE_KV": True},
]
SIZES = {"MODEL_GPT_LAYERS": 12, "MODEL_GPT_HEADS": 12, "MODEL_GPT_EMBED": 768}
FULL = SIZES | {"MODEL_GPT_BLOCK": 1024, "MODEL_GPT_VOCAB": 50304, "MLP_GELU_WIDTH": 3072}


class Zee(NamedTuple):
    """A type of side channel."""

    z: torch.Tensor


class Mirror(Score):
    """s_ij = w_s q_i.k_j + w_r k_i.q_j, and the values once more as a side channel."""

    caches = ("q", "z")

    def forward(self, h, ctx):
        (p,) = h.pieces
        piece = p._replace(q_BHTK=torch.cat([W_S * p.q_BHTK, W_R * h.k_BHTK], -1), k=(*p.k, Field("q", h.q_BHTK)))
        return h._replace(pieces=(piece,), side={Zee: Field("z", 2 * h.v_BHTV)})


class Halve(Gate):
    """The output is the half of what the side channel became, which is what it was."""

    def forward(self, m, h, ctx):
        return m._replace(y_BHTV=m.side[Zee] / 2), ctx


@pytest.fixture
def mirror():
    class Mirrored(Attention, symbol="ATTN_MIRRORED"):
        def parts(self, dims):
            return Mirror(), Halve()

    yield {"ATTN_MIRRORED": True}
    plugin.forget("ATTN_MIRRORED")


def symbols(form=(), latent=L):
    return {"ATTN_MLA": True, "ATTN_MLA_LATENT": latent} | {f"ATTN_MLA_{k}": v for k, v in dict(form).items()}


def host(form, more=()):
    """The attention host of a block at the probe point, and a batch."""
    net = perturbed(assemble({**values(**symbols(form)), **dict(more)}).double())
    return net.blocks[0].attn.eval(), random(B, T, D), random(B, T, L, seed=1)


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def explicit(attn, x, delta, mirrored):
    """What the host computes, head by head, with T x T logits."""
    p, heads = attn.project, []
    c_k = x @ p.dk.weight.T + delta
    c_v = c_k if p.dv is None else x @ p.dv.weight.T
    for h in range(H):
        q = x @ p.q.weight[h * K :][:K].T + p.q.bias[h * K :][:K]
        k, v = c_k @ p.up_k[h % len(p.up_k)].T, c_v @ p.up_v[h % len(p.up_v)]
        if mirrored:  # not folded: two products, the second transposed
            s = W_S * q @ k.mT + W_R * (q @ k.mT).mT
            heads.append((s * K**-0.5).masked_fill(torch.ones(T, T).triu(1) > 0, -torch.inf).softmax(-1) @ v)
        else:
            heads.append(dense([(q[:, None], k[:, None], "causal", 0)], v[:, None], K**-0.5)[0][:, 0])
    return torch.cat(heads, -1) @ attn.out.weight.T + attn.out.bias


def decoded(attn, x, delta, prefill=9):
    """The same from a cache, and the cache."""
    past, rows = Past(T), []
    for start, end in [(0, prefill), (prefill, prefill + 3), *[(t, t + 1) for t in range(prefill + 3, T)]]:
        ctx = Ctx(start=start).put(past, LatentDelta(delta[:, start:end]))
        rows.append(attn(x[:, start:end], ctx)[0])
    return torch.cat(rows, 1), past


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_training_equals_explicit_heads(form):
    attn, x, delta = host(form)
    got, want = attn(x, Ctx().put(LatentDelta(delta)))[0], explicit(attn, x, delta, False)
    assert (got - want).abs().max() < 1e-12
    grads = [torch.autograd.grad((y * x).sum(), list(attn.parameters())) for y in (got, want)]
    assert all((a - b).abs().max() < 1e-11 and (b != 0).any() for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("form", FORMS, ids=str)
@torch.no_grad()
def test_absorbed_decode_equals_explicit_heads(form):
    attn, x, delta = host(form)
    got, past = decoded(attn, x, delta)
    assert (got - explicit(attn, x, delta, False)).abs().max() < 1e-12
    assert past.values_per_token() == (L if form.get("TIE_KV") else 2 * L)


@pytest.mark.parametrize("form", FORMS, ids=str)
@torch.no_grad()
def test_a_reciprocal_term_is_the_same_code_in_training_and_absorbed(form, mirror):
    attn, x, delta = host(form, mirror)
    want = explicit(attn, x, delta, True)
    got, past = decoded(attn, x, delta)
    assert (attn(x, Ctx().put(LatentDelta(delta)))[0] - want).abs().max() < 1e-12
    assert (got - want).abs().max() < 1e-12
    assert past.values_per_token() == (L if form.get("TIE_KV") else 2 * L) + 2 * D
    assert (want - explicit(attn, x, delta, False)).abs().max() > 1e-3  # the term shows


@torch.no_grad()
def test_the_cache_holds_the_amended_latent():
    attn, x, delta = host({})
    _, past = decoded(attn, x, delta)
    want = x @ attn.project.dk.weight.T
    assert (past.fields[0, "c_k"][:, 0] - (want + delta)).abs().max() < 1e-12
    assert (past.fields[0, "c_v"][:, 0] - x @ attn.project.dv.weight.T).abs().max() < 1e-12
    got = attn(x, Ctx().put(LatentDelta(delta)))[1].one(Latent).c_BTL
    assert torch.equal(got, want + delta)
    assert (decoded(attn, x, 0 * delta)[0] - decoded(attn, x, delta)[0]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("form", "latent", "width", "params", "kv"),
    [
        ({}, 128, 3072, 115_020_288, 6_144),
        ({}, 128, 2560, 105_576_960, 6_144),
        ({"TIE_KV": True}, 128, 3072, 115_020_288 - 12 * 768 * 128, 3_072),
        ({"PER_HEAD_K": False}, 128, 3072, 115_020_288 - 12 * 11 * 64 * 128, 6_144),
        (
            {"PER_HEAD_K": False, "PER_HEAD_V": False},
            96,
            3072,
            115_020_288 - 12 * (4 * 768 * 128 - 2 * (768 + 64) * 96),
            4_608,
        ),
    ],
)
def test_sizes_of_gpt2_124m(form, latent, width, params, kv):
    with torch.device("meta"):
        net = network(**FULL | symbols(form, latent) | {"MLP_GELU_WIDTH": width})
    facts = net.facts()
    assert facts["kv_bytes_per_token"] == kv
    assert form or facts["mlp_to_attention"] == width / 1024  # 3.0, 2.5
    assert sum(p.numel() for p in net.parameters()) == params


def test_keys_and_values_start_with_the_variance_of_plain_heads():
    x = torch.nn.functional.layer_norm(random(64, 4, 768).float(), (768,))
    shape = SIZES | {"MODEL_GPT_LAYERS": 1, "MLP_GELU_WIDTH": 16}
    for symbol in ("ATTN_MHA", "ATTN_MLA"):
        h, _ = network(**shape, **{symbol: True}).blocks[0].attn.project(x, Ctx())
        for t in (h.q_BHTK, h.k_BHTK, h.v_BHTV):
            assert abs(t.std() - 0.02 * 768**0.5) < 0.02  # 0.554


def test_training_has_no_part_but_the_projector():
    plain, net = network(), network(**symbols())
    kinds = [[type(m).__name__ for m in n.blocks[0].attn.children()] for n in (plain, net)]
    assert kinds == [["Qkv", "Linear"], ["Latents", "Linear"]]


def test_the_gauge_is_the_std_of_the_key_latent():
    attn, x, delta = host({})
    gauges = Gauges()
    ctx = attn(x, Ctx(layer=2).put(gauges, LatentDelta(delta)))[1]
    assert list(gauges.values) == ["attn/2/mla_latent_std"]
    assert gauges.values["attn/2/mla_latent_std"] == ctx.one(Latent).c_BTL.std()


def test_transformers_has_no_counterpart():
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.project\.up_k: no such tensor in the GPT-2"):
        to_hf(network(**symbols()).state_dict())


@torch.no_grad()
def test_bf16_decode_follows_the_full_pass():
    net, x = network(**symbols()).bfloat16().eval(), tokens(2, T)
    past, full = Past(T), net(x).logits
    got = [net(x[:, s], past=past).logits for s in (slice(9), *(slice(t, t + 1) for t in range(9, T)))]
    assert (torch.cat(got, 1) - full[:, 8:]).abs().max() < 0.02  # logits of 0.3, 8 bits
    assert {t.dtype for t in past.fields.values()} == {torch.bfloat16}


def test_every_field_makes_another_model():
    made = [fingerprint(network(**symbols(form))) for form in FORMS] + [fingerprint(network(**symbols(latent=17)))]
    assert len(set(made)) == len(FORMS) + 1
