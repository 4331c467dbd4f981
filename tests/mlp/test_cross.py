# SPDX-License-Identifier: MIT
"""Cross-token routing against an explicit P on a dense model."""

import math

import pytest
import torch

from ablab import config, plugin
from ablab.attention import Attention
from ablab.tensor.stage import Rows
from tests.attention.calls import Kernels
from tests.blocks import assemble, network, perturbed, tokens, values
from tests.mlp.dense import assert_equal, build, logits

TOPK = {"MLP_CROSS_SPARSE_TOPK": True, "MLP_CROSS_SPARSE_K": 3}
RMS = {"MLP_CROSS_SPARSE_RMS": True, "MLP_CROSS_SPARSE_TAU": '"0.9"'}
CASES = [{}, TOPK, RMS, {**TOPK, "MLP_CROSS_SPARSE_NORMALISE": False}, {**RMS, "MLP_CROSS_SPARSE_NORMALISE": False}]
every = pytest.mark.parametrize("case", CASES, ids=["none", "topk", "rms", "topk-raw", "rms-raw"])


class Scale(Rows):
    """Rows of P that sum to 2."""

    def forward(self, m, h, ctx):
        return m._replace(y_BHTV=2 * m.y_BHTV, side={kind: 2 * t for kind, t in m.side.items()})


@pytest.fixture
def doubled():
    class Twice(Attention, symbol="ATTN_TWICE"):
        def parts(self, dims):
            return (Scale(),)

    yield
    plugin.forget("ATTN_TWICE")


def restrict(s_BHTT, case):
    """P with the entries that route, in logarithms and by sorting."""
    p_BHTT = s_BHTT.softmax(-1)
    if not case:
        return p_BHTT
    if case.keys() >= TOPK.keys():
        rank = s_BHTT.argsort(-1, descending=True).argsort(-1)
        keep = rank < 3
    else:
        n_T1 = torch.arange(1, s_BHTT.shape[2] + 1, dtype=s_BHTT.dtype)[:, None]
        lse2 = (2 * s_BHTT).logsumexp(-1, keepdim=True)
        keep = s_BHTT >= lse2 / 2 - n_T1.log() / 2 + math.log(0.9)
    assert 0.1 < keep.tril().sum() / torch.ones_like(keep).tril().sum() < 0.9  # it does restrict
    p_BHTT = torch.where(keep, p_BHTT, 0.0)
    return p_BHTT if "MLP_CROSS_SPARSE_NORMALISE" in case else p_BHTT / p_BHTT.sum(-1, keepdim=True)


def dense(net, x, case, scale=1.0):
    z = {}

    def hidden(layer, p, h, s):
        if layer:
            z_BHTC = z[layer - 1].unflatten(-1, (4, 4)).transpose(1, 2)
            routed = scale * (restrict(s, case) @ z_BHTC).transpose(1, 2).flatten(2)
            h = h + 0.7 * 0.5 * routed @ p["mlp.enrich.cross.z_up"].T
        if layer < 2:
            z[layer] = h @ p["mlp.emit.cross.z_down"].T
        return h

    return logits(net, x, head=lambda layer, p, o: scale * o, hidden=hidden)


def make(case, **typed):
    got = values(MLP_CROSS=True, MLP_CROSS_RANK=16, MLP_CROSS_ALPHA='"0.5"', **case) | typed
    net = perturbed(assemble(got).double(), 0.2)
    net.lam.fill_(0.7)
    return net


@every
def test_logits_and_gradients_equal_an_explicit_product(case):
    net, x = make(case), tokens(2, 40)
    assert_equal(net, x, dense(net, x, case))


@every
def test_what_scales_rows_of_p_scales_what_is_routed(doubled, case):
    net, x = make(case, ATTN_TWICE=True), tokens(2, 40)
    want = dense(net, x, case, scale=2.0)
    assert (net(x).logits - want).abs().max() < 1e-11
    assert (dense(net, x, case) - want).abs().max() > 1e-3


def test_what_is_offered_counts_in_the_cache_from_block_1_on():
    held = [net.facts()["kv_bytes_per_token"] for net in (network(), make({}), make(TOPK))]
    assert held == [2 * 3 * 2 * 32, *2 * [held[0] + 2 * 2 * 16]]


def test_sparse_routing_leaves_the_width_of_the_one_attention_call_alone():
    net, x = network(MLP_CROSS=True, MLP_CROSS_RANK=16, **TOPK), tokens(2, 40)
    with Kernels() as seen:
        net(x)
    assert {call[1:] for call in seen.calls} == {(8, 8)}
    with Kernels() as seen:
        network(MLP_CROSS=True, MLP_CROSS_RANK=16)(x)
    assert {call[1:] for call in seen.calls} == {(8, 8), (16, 16)}


@pytest.mark.parametrize(("rank", "near"), [(18, "16 or 20"), (4, "8")])
def test_a_rank_that_heads_cannot_share_is_refused(rank, near):
    heads = {18: 4, 4: 8}[rank]
    text = rf"CONFIG_MLP_CROSS_RANK = {rank} is no multiple of CONFIG_MODEL_GPT_HEADS = {heads} : .*; set {near}$"
    with pytest.raises(ValueError, match=text):
        build(symbols=["MLP_CROSS"], MLP_CROSS_RANK=rank, MODEL_GPT_HEADS=heads)


def test_flops_beyond_parameters_are_those_of_routing():
    dims = network(MODEL_GPT_LAYERS=2).dims
    one, two = (config.create("MLP", values(MLP_CROSS=True, MLP_CROSS_RANK=16, **case))[1] for case in ({}, RMS))
    assert [one.flops(dims.at(layer), 100) for layer in (0, 1)] == [0, 100 * 2 * 16]
    # P again from q and k, D channels in all, and P z
    assert [two.flops(dims.at(layer), 100) for layer in (0, 1)] == [0, 100 * 2 * (32 + 16)]
