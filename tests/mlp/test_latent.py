# SPDX-License-Identifier: MIT
"""Latent reciprocity against its formula on a dense model with a stand-in projector."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ablab import config
from tests.blocks import perturbed, tokens, values
from tests.mlp.dense import assert_equal, build, logits

TYINGS = ["TIED_TRANSPOSE", "UNTIED", "PER_HEAD_SCALAR"]
pytestmark = pytest.mark.usefixtures("stand")


def make(tying, latent=16, **typed):
    return build(symbols=["MLP_LATENT", f"MLP_LATENT_TYING_{tying}"], latent=latent, **typed)


@pytest.mark.parametrize("tying", TYINGS)
def test_logits_and_gradients_equal_the_dense_formula(tying):
    net, x, c, delta = perturbed(make(tying, MLP_LATENT_ALPHA='"0.3"').double(), 0.2), tokens(2, 40), {}, {}
    net.lam.fill_(0.7)

    def project(p, x_BTD, n_head):
        layer = len(c)
        c[layer] = x_BTD @ p["attn.project.dk.weight"].T
        if layer:
            c[layer] = c[layer] + delta[layer - 1]
        q, k = x_BTD @ p["attn.project.q.weight"].T, c[layer] @ p["attn.project.up"].T
        q, k = (t.unflatten(-1, (n_head, -1)).transpose(1, 2) for t in (q, k))
        return q, k, k

    def hidden(layer, p, h, s):
        w = p["mlp.enrich.latent.lat_w"]
        m_F = a_L = 0.3
        if tying == "PER_HEAD_SCALAR":
            m_F = torch.cat([m.expand(32) for m in p["mlp.enrich.latent.lat_sm"]])
        h = h + 0.7 * m_F * (c[layer] @ w.T)
        if layer < 2:
            if tying == "PER_HEAD_SCALAR":
                a_L = torch.cat([a.expand(4) for a in p["mlp.emit.latent.lat_sa"]])
            delta[layer] = 0.7 * a_L * (h @ (p["mlp.emit.latent.lat_d"] if tying == "UNTIED" else w))
        return h

    assert_equal(net, x, logits(net, x, project=project, hidden=hidden))


@pytest.mark.parametrize("tying", TYINGS)
def test_one_matrix_is_one_tensor_however_often_it_is_used(tying):
    net = make(tying)
    names = {n.rpartition(".")[2]: p for n, p in net.named_parameters() if "latent.lat_" in n}
    more = {"TIED_TRANSPOSE": set(), "UNTIED": {"lat_d"}, "PER_HEAD_SCALAR": {"lat_sm", "lat_sa"}}[tying]
    assert set(names) == {"lat_w"} | more
    assert all((p == 0.2).all() for n, p in names.items() if n.startswith("lat_s"))
    assert len(net.state_dict()) == len({t.data_ptr() for t in net.state_dict().values()})


@pytest.mark.parametrize("tying", TYINGS)
def test_declared_flops_are_those_that_torch_counts(tying):
    (member,) = config.create("MLP", values(ATTN_MLA=True, MLP_LATENT=True, **{f"MLP_LATENT_TYING_{tying}": True}))[1:]
    net, host, x, counts = make(tying), build(latent=16), tokens(2, 40), []
    for model in (net, host):
        with FlopCounterMode(display=False) as counter:
            model(x)
        counts.append(counter.get_total_flops())
    matrices = sum(p.numel() for n, p in net.named_parameters() if "latent.lat_" in n and p.ndim == 2)
    extra = sum(member.flops(net.dims.at(layer), 40) for layer in range(3))
    assert counts[0] - counts[1] == x.numel() * (2 * matrices + extra) > 0


@pytest.mark.parametrize(
    ("latent", "width", "text"),
    [
        (18, 128, r"ATTN_MLA_LATENT = 18 is no multiple of CONFIG_MODEL_GPT_HEADS = 4 : .*PER_HEAD.* set 16 or 20"),
        (16, 130, r"MLP_GELU_WIDTH = 130 is no multiple of CONFIG_MODEL_GPT_HEADS = 4 : .*PER_HEAD.* set 128 or 132"),
    ],
)
def test_unequal_chunks_are_refused_for_scalars_only(latent, width, text):
    with pytest.raises(ValueError, match=text):
        make("PER_HEAD_SCALAR", latent, MLP_GELU_WIDTH=width)
    assert make("UNTIED", latent, MLP_GELU_WIDTH=width).dims.latent == latent
