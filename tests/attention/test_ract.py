# SPDX-License-Identifier: MIT
"""RA-CT: gates and their gradients against explicit rows of P; what is detached, bounded, averaged and reported."""

import pytest
import torch
from torch.utils import flop_counter

from ablab import config
from ablab.attention.ract import Apply, OutputGate, Ract, Stat, WeightsGate
from ablab.tensor.attend import attend
from ablab.tensor.stage import CAUSAL, Coupling, Ctx, Dims, Field, Gauges, Heads, Piece
from tests.blocks import assemble, dense, network, perturbed, tokens, values
from tests.tensor.test_attend import random

B, H, T, D = 2, 3, 24, 8
DIMS = Dims(n_embd=H * D, n_head=H, head_dim=D, mlp_hidden=8, block_size=T, bias=True, dropout=0.0, n_layer=1)
LAM = 0.75  # exact in fp32
STATS = pytest.mark.parametrize("stat", Stat)
APPLIES = pytest.mark.parametrize("apply", Apply)


class Zee:
    """A type of side channel."""


def settings(stat=Stat.TOPK, apply=Apply.OUTPUT, **changes):
    rest = {"k": 4, "head_average": False, "detach_stats": False}
    rest["alpha"] = 0.2 if apply is Apply.WEIGHTS else None
    return Ract.Config(**{"stat": stat, "apply": apply, **rest, **changes})


def part_of(config):
    part = (OutputGate if config.apply is Apply.OUTPUT else WeightsGate)(DIMS, config).double()
    part.symbol = "ATTN_RACT"
    with torch.no_grad():
        part.a_H.copy_(random(H, seed=8))
        part.b_H.copy_(random(H, seed=9))
    return part


def inputs():
    return [random(B, H, T, n, seed=i).requires_grad_() for i, n in enumerate((D, D, D, 2))]


def run(part, t, *context):
    q, k, v, z = t
    h = Heads(q, k, v, D**-0.5, (Piece(q, (Field("k", k),), CAUSAL),), Field("v", v), {Zee: Field("z", z)})
    ctx = Ctx().put(Coupling(torch.tensor(LAM)), *context)
    m, ctx = attend(h, ctx, part.wants_lse)
    got = part(m, h, ctx)
    m = got if part.stage == "rows" else got[0]
    return m.y_BHTV, m.side[Zee]


def reference(part, t):
    """(y, side) by an explicit P, row by row."""
    c, (q, k, v, z) = part.config, t
    p, _ = dense([(q, k, "causal", 0)], torch.eye(T, dtype=torch.float64).expand(B, H, T, T), D**-0.5)
    statistic = torch.zeros(B, H, T, dtype=torch.float64)
    for i in range(T):
        row, n = p[:, :, i, : i + 1], i + 1
        count = 1 if c.stat is Stat.MAX else c.k
        if c.stat is Stat.ENTROPY and n > 1:
            statistic[:, :, i] = -(row * row.log()).sum(-1) / torch.tensor(n, dtype=torch.float64).log()
        elif c.stat is Stat.RMS and n > 1:
            statistic[:, :, i] = ((row**2).sum(-1).sqrt() - n**-0.5) / (1 - n**-0.5)
        elif c.stat in (Stat.TOPK, Stat.MAX) and n > count:
            statistic[:, :, i] = (row.sort(-1).values[..., -count:].sum(-1) - count / n) / (1 - count / n)
    if c.head_average:
        statistic = statistic.mean(1, keepdim=True)
    if c.detach_stats:
        statistic = statistic.detach()
    alpha = 0.2 if c.apply is Apply.WEIGHTS else 1.0
    u = part.a_H[:, None] * statistic + part.b_H[:, None]
    gate = (1 + LAM * (alpha * (2 * u.sigmoid() - 1)))[..., None]
    return (gate * p) @ v, ((gate * p) if c.apply is Apply.WEIGHTS else p) @ z


def gradients(outputs, part, t):
    total = sum((o * random(*o.shape, seed=50 + i)).sum() for i, o in enumerate(outputs))
    return torch.autograd.grad(total, [part.a_H, part.b_H, *t])


@STATS
@APPLIES
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("detach", [False, True])
def test_gated_rows_and_gradients_are_those_of_the_explicit_matrix(stat, apply, average, detach):
    part, t = part_of(settings(stat, apply, head_average=average, detach_stats=detach)), inputs()
    got, want = run(part, t), reference(part, t)
    for a, b in zip((*got, *gradients(got, part, t)), (*want, *gradients(want, part, t)), strict=True):
        assert (a - b).abs().max() < 1e-9


@STATS
def test_detached_and_attached_statistics_differ_in_the_gradient_of_q_alone(stat):
    """Negative control of the test above: the two settings are not one."""
    found = []
    for detach in (False, True):
        part, t = part_of(settings(stat, detach_stats=detach)), inputs()
        found.append(gradients(run(part, t), part, t))
    (a, b, q, *_), (a2, b2, q2, *_) = found
    assert torch.allclose(a, a2, atol=1e-12) and torch.allclose(b, b2, atol=1e-12) and (q - q2).abs().max() > 1e-3


@APPLIES
def test_the_gate_stays_inside_its_bounds(apply):
    part, t = part_of(settings(apply=apply)), inputs()
    plain = reference(part_of(settings()), t)
    with torch.no_grad():
        part.a_H.fill_(0)
        part.b_H.copy_(torch.tensor([1e4, -1e4, 0.0]))
    y, side = run(part, t)
    alpha = 0.2 if apply is Apply.WEIGHTS else 1.0
    p, _ = dense([(t[0], t[1], "causal", 0)], t[2], D**-0.5)
    gate = torch.tensor([1 + LAM * alpha, 1 - LAM * alpha, 1.0], dtype=y.dtype)[:, None, None]
    assert (y - gate * p).abs().max() < 1e-12
    assert torch.allclose(side, plain[1] * (gate if apply is Apply.WEIGHTS else 1), atol=1e-7)


def on(**symbols):
    return values(ATTN_RACT=True, **{f"ATTN_RACT_{name}": value for name, value in symbols.items()})


VARIANTS = [
    {stat: True, apply: True, "HEAD_AVERAGE": average, "DETACH_STATS": detach}
    for stat in ("STAT_TOPK", "STAT_MAX", "STAT_ENTROPY", "STAT_RMS")
    for apply in ("APPLY_OUTPUT", "APPLY_WEIGHTS")
    for average, detach in ((False, True), (True, False))
]


@pytest.mark.parametrize("symbols", VARIANTS, ids=lambda v: "+".join(n for n in v if v[n]))
def test_at_init_and_without_coupling_a_model_is_its_host(symbols):
    host, net, x = assemble(values()), assemble(on(**symbols)), tokens(2, 40)
    assert torch.equal(net(x).logits, host(x).logits)
    perturbed(net).lam.fill_(0.0)
    host.load_state_dict(net.state_dict(), strict=False)
    assert torch.equal(net(x).logits, host(x).logits)
    net.lam.fill_(1.0)
    assert not torch.equal(net(x).logits, host(x).logits)


def test_autocast_keeps_the_type_of_what_is_gated():
    part = part_of(settings()).float()
    with torch.autocast("cpu", torch.bfloat16):
        y, side = run(part, [x.detach().bfloat16() for x in inputs()])
    assert y.dtype == side.dtype == torch.bfloat16


def test_gauges_are_mean_and_spread_of_statistic_and_gate():
    part, gauges = part_of(settings()), Gauges()
    part.a_H.data.zero_()
    part.b_H.data.fill_(2.0)
    run(part, inputs(), gauges)
    got = {name.removeprefix("attn/0/ract_"): v.item() for name, v in gauges.values.items()}
    assert set(got) == set(part.gauges) and 0 < got["t_mean"] < 1 and got["t_std"] > 0
    assert got["gate_mean"] == pytest.approx(1 + LAM * 0.7615941559557649) and got["gate_std"] < 1e-12  # tanh 1


RMS, RWR, RA = {"ATTN_RACT": True, "ATTN_RACT_STAT_RMS": True}, {"ATTN_RWR": True}, {"ATTN_RECIPROCAL": True}


@pytest.mark.parametrize(
    ("host", "member", "factor"),
    # the convention leaves out logits that a backward pass computes again, and values padded to the keys of RA
    [({}, RMS, 1.0), (RA, RMS, 1.0), ({}, RWR, 3.5 / 3), (RA, RWR, 3.5 / 3 * 4 / 3)],
)
def test_further_passes_count_as_what_runs_forward_and_backward(host, member, factor):
    aten, count = torch.ops.aten, {}
    forward, backward = (getattr(aten, f"_scaled_dot_product_flash_attention_for_cpu{s}") for s in ("", "_backward"))
    count[forward] = lambda q, k, v, *_, **more: flop_counter.sdpa_flop_count(q, k, v)
    count[backward] = lambda do, q, k, v, *_, **more: flop_counter.sdpa_backward_flop_count(do, q, k, v)
    run, said = [], []
    for more in ({}, member):
        net, x = network(**host, **more), tokens(1, 40)
        with flop_counter.FlopCounterMode(display=False, custom_mapping=count) as seen:
            net(x, x).loss.backward()
        run.append(seen.get_total_flops() / 40)
        said.append(net.flops_per_token(40) - 6 * sum(p.numel() for p in net.parameters()))
    assert abs((run[1] - run[0]) / (said[1] - said[0]) - factor) < 1e-3  # whole numbers


def test_flops_are_a_product_or_an_attention_over_the_full_length():
    one = 2 * 100 * DIMS.n_embd  # Q K^T
    for stat, count in {Stat.TOPK: 1, Stat.MAX: 1, Stat.ENTROPY: 2, Stat.RMS: 2}.items():
        member = Ract(settings(stat), None)
        assert member.flops(DIMS, 100) == count * one and member.size(DIMS) == 2 * H
    (member,) = [m for m in config.create("ATTN", on()) if m.symbol == "ATTN_RACT"]
    assert (member.config.k, member.config.alpha) == (8, None)
