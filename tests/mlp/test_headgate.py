# SPDX-License-Identifier: MIT
"""The head gate against its formula on a dense model."""

import torch
import torch.nn.functional as F

from ablab.tensor.stage import Gauges
from tests.blocks import perturbed, tokens
from tests.mlp.dense import assert_equal, build, logits


def test_logits_and_gradients_equal_the_dense_formula():
    net, x, u = perturbed(build(symbols=["MLP_HEADGATE"], MLP_HEADGATE_ALPHA='"0.4"').double(), 0.3), tokens(2, 40), {}
    net.lam.fill_(0.7)

    def hidden(layer, p, h, s):
        at = "mlp.emit.headgate."
        if layer < 2:
            u[layer] = F.gelu(h @ p[at + "gate_in"].T) @ p[at + "gate_out"].T + p[at + "b"]
        return h

    def head(layer, p, o):
        if layer == 0:
            return o
        gate = (1 - 0.4) + 2 * 0.4 * torch.sigmoid(u[layer - 1])  # at lam = 1
        return o * (1 + 0.7 * (gate - 1)).transpose(1, 2)[..., None]

    assert_equal(net, x, logits(net, x, head=head, hidden=hidden))
    host = build().double()
    host.load_state_dict(net.state_dict(), strict=False)
    assert (host(x).logits - net(x).logits).abs().max() > 1e-3  # the gate is not inert here


def test_gate_stays_inside_its_bounds_and_keeps_its_sign_under_bf16():
    net, seen = build(symbols=["MLP_HEADGATE"]), []
    emit = net.blocks[0].mlp.emit["headgate"]
    emit.register_forward_hook(lambda m, args, out: seen.append(out.s_BTH))
    with torch.no_grad():
        emit.b.copy_(torch.tensor([0.01, -0.01, 50.0, -50.0]))
        with torch.autocast("cpu", torch.bfloat16):
            net(tokens(2, 8))
    (s_BTH,) = seen
    assert s_BTH.dtype == torch.float32  # in bf16 1 + 0.1 * 0.005 were 1
    want = torch.tensor([1.0005, 0.9995, 1.1, 0.9])
    assert (s_BTH - want).abs().max() < 1e-5


def gauges(net, x):
    seen = Gauges()
    net(x, gauges=seen)
    return seen.values


def test_gauges_of_a_gate_are_those_of_its_scale():
    net, x = build(symbols=["MLP_HEADGATE"]).double(), tokens(2, 8)
    got = gauges(net, x)
    assert [got[f"mlp/0/headgate_{g}"] for g in ("scale_mean", "scale_std", "bound_frac")] == [1, 0, 0]
    with torch.no_grad():
        net.blocks[0].mlp.emit["headgate"].b.copy_(torch.tensor([20.0, -20.0, -20.0, 0.0]))
    got = gauges(net, x)
    scale = torch.tensor([1.1, 0.9, 0.9, 1.0], dtype=torch.float64)
    assert (got["mlp/0/headgate_scale_mean"] - scale.mean()).abs() < 1e-7
    assert (got["mlp/0/headgate_scale_std"] - scale.std(correction=0)).abs() < 1e-7
    assert got["mlp/0/headgate_bound_frac"] == 0.75
