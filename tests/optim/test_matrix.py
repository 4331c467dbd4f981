# SPDX-License-Identifier: MIT
"""Rules for matrices: balance, torch's Muon, which tensors they act on, the gate, the state they claim."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ablab import build
from ablab.optim import Impl
from ablab.optim.adamw import Settings
from ablab.optim.muon import Adjust, FlatMuon
from ablab.optim.sinkgd import FlatSinkgd, Form, balanced
from tests.prune.rig import made, run

REST = Settings(beta1=0.9, beta2=0.95, eps=1e-8)
ADJUSTED = {Adjust.ORIGINAL: "original", Adjust.MATCH: "match_rms_adamw"}


def sink(form=Form.PAPER, **changes):
    return SimpleNamespace(**{"form": form, "iters": 5, "tau": 0.1, "scale": 1.0, **changes})


def muon(**changes):
    return SimpleNamespace(**{"momentum": 0.95, "nesterov": True, "iters": 5, "adjust": Adjust.MATCH, **changes})


def groups(matrices, vectors):
    return [
        {"name": "plain", "params": vectors, "weight_decay": 0.0, "lr": 0.01},
        {"name": "matrix", "params": matrices, "weight_decay": 0.1, "lr": 0.01},
    ]


def parameters(seed=0):
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(s)) for s in ((24, 16), (8, 24))], [nn.Parameter(torch.randn(24))]


def test_balanced_rows_and_columns_have_equal_norms():
    g = torch.randn(40, 24, dtype=torch.float64) * torch.rand(40, 1) * torch.rand(24)
    x = balanced(g, Form.PAPER, 50, None)
    assert torch.allclose(x.square().mean().sqrt(), torch.ones((), dtype=x.dtype), atol=1e-5)
    assert torch.allclose(x.norm(dim=0) / 40**0.5, torch.ones(24, dtype=x.dtype), atol=1e-5)
    assert torch.allclose(x.norm(dim=1) / 24**0.5, torch.ones(40, dtype=x.dtype), atol=1e-5)
    assert torch.equal(x.sign(), g.sign())
    once = g / g.norm(dim=1, keepdim=True) * 24**0.5
    assert torch.allclose(balanced(g, Form.PAPER, 1, None), once / once.norm(dim=0) * 40**0.5)


def test_the_tanh_form_keeps_the_size_of_the_gradient():
    g = torch.randn(40, 24)
    x = balanced(g, Form.TANH, 5, 0.1)
    assert torch.isclose(x.norm(), g.norm(), rtol=1e-5)
    y = g.double()
    for _ in range(5):
        y = y / y.abs().sum(1, keepdim=True)
        y = torch.tanh(y / y.abs().sum(0, keepdim=True) / 0.1)
    assert torch.allclose(x.double(), y * g.double().norm() / y.norm(), atol=1e-5)
    assert not torch.allclose(x, balanced(g, Form.TANH, 5, 1.0), atol=1e-3)


@pytest.mark.parametrize("form", Form)
def test_zeros_stay_zero(form):
    g = torch.randn(10, 6)
    g[3], g[:, 2] = 0, 0
    x = balanced(g, form, 5, 0.1)
    assert not x[3].any() and not x[:, 2].any() and x.isfinite().all()
    assert not balanced(torch.zeros(4, 5), form, 5, 0.1).any()


def test_a_step_of_sinkgd_is_the_formula():
    matrices, vectors = parameters()
    optimizer = FlatSinkgd(groups(matrices, vectors), sink(scale=0.5), REST, Impl.FUSED)
    before = [p.detach().clone() for p in matrices]
    optimizer.arena.grads[: len(optimizer.arena.weights)].normal_()
    want = [
        w * (1 - 0.01 * 0.1) - 0.005 * balanced(p.grad, Form.PAPER, 5, None)
        for w, p in zip(before, matrices, strict=True)
    ]
    kept = vectors[0].detach().clone()
    optimizer.gate(torch.tensor(1.0), 1.0)
    optimizer.step()
    for p, w in zip(matrices, want, strict=True):
        assert torch.allclose(p, w, atol=1e-6)  # balance does not see the clip
    assert torch.allclose((kept - vectors[0]).abs(), torch.full((24,), 0.01), rtol=1e-3)  # AdamW's first step


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", Adjust)
def test_muon_equals_torch_bit_for_bit(nesterov, adjust):
    (matrices, vectors), (twins, others) = parameters(), parameters()
    ours = FlatMuon(groups(matrices, vectors), muon(nesterov=nesterov, adjust=adjust), REST, Impl.FUSED)
    theirs = torch.optim.Muon(twins, lr=0.01, nesterov=nesterov, adjust_lr_fn=ADJUSTED[adjust])
    adamw = torch.optim.AdamW(others, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for t in range(4):
        for p, q in zip(matrices + vectors, twins + others, strict=True):
            p.grad.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(t)))
            q.grad = p.grad.clone()
        ours.gate(torch.tensor(1.0), 0.0)
        ours.step()
        theirs.step()
        adamw.step()
    for p, q in zip(matrices + vectors, twins + others, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("impl", Impl)
@pytest.mark.parametrize("kind", ["sinkgd", "muon"])
def test_a_refused_step_changes_nothing(kind, impl):
    net = groups(*parameters())
    optimizer = FlatMuon(net, muon(), REST, impl) if kind == "muon" else FlatSinkgd(net, sink(), REST, impl)
    flats = [optimizer.arena.weights, optimizer.count, *optimizer.flats.values()]
    for poison in (1.0, torch.nan, 1.0):
        before = [t.clone() for t in flats]
        optimizer.arena.grads[: len(optimizer.arena.weights)].normal_()
        optimizer.arena.grads[30] *= poison
        optimizer.gate(torch.tensor(1.0), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert all(torch.equal(a, b) is (poison != 1.0) for a, b in zip(flats, before, strict=True))


@pytest.mark.parametrize(("name", "per"), [("SINKGD", 0), ("MUON", 4)])
def test_linear_weights_and_nothing_else_follow_the_rule(name, per):
    cfg, built, _ = made(f"CONFIG_OPT_{name}=y\nCONFIG_OPT_DECAY_EMBED=y\n", 16)
    assert built.groups == {"decay": (256 + 32) * 32, "plain": 26368 - 16384 - 288 * 32, "matrix": 16384}
    (clause,) = cfg.optim.contracts()
    found = clause.judge(built)
    assert found["ok"] and found["measured"] == 8 * (26368 - 16384) + per * 16384
    built.optimizer.zeros("more")
    assert not clause.judge(built)["ok"]
    others = build.grouped(made("", 16)[0], built.model)
    assert [g["name"] for g in others] == ["decay", "plain"] and len(others[0]["params"]) == 8


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("SINKGD", "CONFIG_OPT_SINKGD_FORM_TANH=y"),
        ("SINKGD", "CONFIG_OPT_SINKGD_ITERS=1"),
        ("SINKGD=y\nCONFIG_OPT_SINKGD_FORM_TANH", 'CONFIG_OPT_SINKGD_TAU="0.5"'),
        ("SINKGD", 'CONFIG_OPT_SINKGD_SCALE="0.5"'),
        ("SINKGD", 'CONFIG_OPT_ADAMW_BETA1="0.5"'),
        ("MUON", 'CONFIG_OPT_MUON_MOMENTUM="0.5"'),
        ("MUON", "CONFIG_OPT_MUON_NESTEROV=n"),
        ("MUON", "CONFIG_OPT_MUON_ITERS=3"),
        ("MUON", "CONFIG_OPT_MUON_ADJUST_ORIGINAL=y"),
        ("MUON", 'CONFIG_OPT_ADAMW_EPS="1e-3"'),
    ],
)
def test_turning_a_knob_changes_weights(name, line):
    a, b = run(f"CONFIG_OPT_{name}=y\n", 4)[0], run(f"CONFIG_OPT_{name}=y\n{line}\n", 4)[0]
    assert not torch.equal(a.optimizer.arena.weights, b.optimizer.arena.weights)


PRUNED = "CONFIG_PRUNE_MAGNITUDE=y\nCONFIG_PRUNE_WARMUP=2\nCONFIG_PRUNE_INTERVAL=3\nCONFIG_OPT_"


@pytest.mark.parametrize("tied", ["n", "y"])
def test_zero_is_a_fixed_point_of_sinkgd(tied):
    extra = f"{PRUNED}SINKGD=y\nCONFIG_PRUNE_TIED={tied}\n"
    everything = lambda built, p: p.mask.apply(built.optimizer.arena.weights, *built.optimizer.flats.values())
    (a, p), (b, _) = run(extra, 30), run(extra, 30, everything)
    assert torch.equal(a.optimizer.arena.weights, b.optimizer.arena.weights)
    assert p.sparsity() == pytest.approx(0.5, abs=1e-4)
    if tied == "y":
        head = a.model.wte.weight
        assert not a.optimizer.state[head]["exp_avg"][head == 0].any()


def test_zero_is_no_fixed_point_of_muon():
    with pytest.raises(ValueError, match="stayed n"):
        made(f"{PRUNED}MUON=y\nCONFIG_PRUNE_SCOPE_FULL=y\n", 16)
    built, pruner = run(f"{PRUNED}MUON=y\n", 16)
    assert pruner.sparsity() == pytest.approx(0.5, abs=1e-4)
    pruner.full = True  # as if it could
    pruner.mask_gradients()
    built.optimizer.arena.grads[: len(built.optimizer.arena.weights)].normal_()
    pruner.mask_gradients()
    built.optimizer.gate(torch.tensor(1.0), 1.0)
    built.optimizer.step()
    assert pruner.sparsity() < 0.1  # almost every pruned weight has moved


@pytest.mark.parametrize("kind", ["sinkgd", "muon"])
def test_coupled_matrices_rest_while_their_strength_is_zero(kind):
    matrices, vectors = parameters()
    lam, (plain, matrix) = torch.zeros(()), groups(matrices[:1], vectors)
    net = [plain, matrix, {**matrix, "name": "coupled_matrix", "params": matrices[1:], "lam": lam}]
    optimizer = FlatMuon(net, muon(), REST, Impl.FUSED) if kind == "muon" else FlatSinkgd(net, sink(), REST, Impl.FUSED)
    resting = [matrices[1], *optimizer.state[matrices[1]].values()]
    for strength in (0.0, 1.0):
        lam.fill_(strength)
        before, other = [t.clone() for t in resting], matrices[0].detach().clone()
        optimizer.arena.grads[: len(optimizer.arena.weights)].normal_()
        optimizer.gate(torch.tensor(1.0), 1.0)
        optimizer.step()
        assert all(torch.equal(a, b) is (strength == 0) for a, b in zip(resting, before, strict=True))
        assert not torch.equal(matrices[0], other)
