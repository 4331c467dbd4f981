# SPDX-License-Identifier: MIT
"""Every simple rule: bit-equal to torch, equal to its formula in float64, gated, with the state it claims."""

import pytest
import torch
from torch import nn

from ablab.optim import Impl
from ablab.optim.adam import FlatAdam
from ablab.optim.adamw import FlatAdamW
from ablab.optim.sgd import FlatSgd
from tests.optim.test_flat import groups, model
from tests.prune.rig import made, run

B1, B2, EPS, LAM, LR, MU = 0.9, 0.95, 1e-8, 0.1, 0.01, 0.9
BETAS = {"betas": (B1, B2), "eps": EPS}
TORCH = {Impl.FUSED: {"fused": True}, Impl.FOREACH: {"foreach": True}, Impl.LOOP: {"foreach": False}}
RULES = {
    "sgd": (lambda g, i: FlatSgd(g, MU, False, i), lambda p, **k: torch.optim.SGD(p, 0.1, momentum=MU, **k)),
    "nesterov": (
        lambda g, i: FlatSgd(g, MU, True, i),
        lambda p, **k: torch.optim.SGD(p, 0.1, momentum=MU, nesterov=True, **k),
    ),
    "plain sgd": (lambda g, i: FlatSgd(g, 0.0, False, i), lambda p, **k: torch.optim.SGD(p, 0.1, **k)),
    "adam": (lambda g, i: FlatAdam(g, B1, B2, EPS, i), lambda p, **k: torch.optim.Adam(p, **BETAS, **k)),
    "adamw": (lambda g, i: FlatAdamW(g, B1, B2, EPS, i), lambda p, **k: torch.optim.AdamW(p, **BETAS, **k)),
    "amsgrad": (
        lambda g, i: FlatAdamW(g, B1, B2, EPS, i, True),
        lambda p, **k: torch.optim.AdamW(p, amsgrad=True, **BETAS, **k),
    ),
}
every = pytest.mark.parametrize("rule", RULES)


def formula(rule, w, gradients):
    """The rules as written in the files, one coordinate like another."""
    b, m, v, x = (torch.zeros_like(w) for _ in range(4))
    for t, g in enumerate(gradients, 1):
        if "sgd" in rule or rule == "nesterov":
            g = g + LAM * w
            b = g if rule == "plain sgd" else MU * b + g
            w = w - LR * (g + MU * b if rule == "nesterov" else b)
            continue
        g = g + LAM * w if rule == "adam" else g
        w = w if rule == "adam" else w * (1 - LR * LAM)
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g * g
        x = torch.maximum(x, v) if rule == "amsgrad" else v
        w = w - LR * (m / (1 - B1**t)) / ((x / (1 - B2**t)).sqrt() + EPS)
    return w


@every
@pytest.mark.parametrize("impl", Impl)
def test_it_equals_torch_bit_for_bit(rule, impl):
    ours_of, torch_of = RULES[rule]
    net, twin = model(32, 64), model(32, 64)  # multiples of the vector length; see FlatAdamW
    ours, wanted = ours_of(groups(net), impl), torch_of(groups(twin), **TORCH[impl])
    for n in range(6):
        x = torch.randn(8, 32, generator=torch.Generator().manual_seed(n))
        for a, optimizer in ((net, ours), (twin, wanted)):
            loss = a(x).square().mean()
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * (n + 1)
            if optimizer is ours:
                ours.gate(loss.detach(), 0.0)
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


@every
@pytest.mark.parametrize("impl", Impl)
def test_it_equals_the_formula(rule, impl):
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(200, dtype=torch.float64))
    gradients = [torch.randn(200, dtype=torch.float64) * (300 if t % 37 == 0 else 1) for t in range(1, 301)]
    want = formula(rule, w.detach().clone(), gradients)
    optimizer = RULES[rule][0]([{"name": "decay", "params": [w], "weight_decay": LAM, "lr": LR}], impl)
    for g in gradients:
        optimizer.arena.grads[:200] = g
        optimizer.gate(torch.tensor(1.0), 0.0)
        optimizer.step()
    assert torch.allclose(w, want, rtol=1e-12, atol=1e-12)


@every
@pytest.mark.parametrize("impl", Impl)
def test_nothing_is_applied_that_is_not_finite(rule, impl):
    net = model()
    optimizer = RULES[rule][0](groups(net), impl)
    for poison in (1.0, torch.nan, 1.0):
        before = [t.clone() for t in (optimizer.arena.weights, *optimizer.flats.values())]
        optimizer.arena.grads.fill_(0.1)
        optimizer.arena.grads[3] *= poison
        optimizer.gate(torch.tensor(1.0), 1.0)
        optimizer.step()
        kept = zip((optimizer.arena.weights, *optimizer.flats.values()), before, strict=True)
        assert all(torch.equal(a, b) is (poison != 1.0) for a, b in kept)


SPAM = "CONFIG_OPT_ADAMWSPAM_INTERVAL=6\nCONFIG_OPT_ADAMWSPAM_REWARM=3\nCONFIG_OPT_ADAMWSPAM_GRACE=2\n"


@pytest.mark.parametrize("base", ["ADAM", "ADAMW", "ADAMWADV", "ADAMWSPAM"])
def test_without_pruning_the_composed_optimizer_is_its_base(base):
    extra = f'CONFIG_OPT_{base}_BETA1="0.8"\n' + (SPAM if base == "ADAMWSPAM" else "")
    composed = f"CONFIG_OPT_ADAMWPRUNE=y\nCONFIG_OPT_ADAMWPRUNE_BASE_{base}=y\n"
    (a, _), (b, pruner) = run(f"{extra}CONFIG_OPT_{base}=y\n"), run(extra + composed)
    assert torch.equal(a.optimizer.arena.weights, b.optimizer.arena.weights) and pruner.nbytes == 0
    assert a.optimizer.flats.keys() == b.optimizer.flats.keys()
    other, _ = run(f"{extra}CONFIG_OPT_{base}=y\n".replace("0.8", "0.7"))
    assert not torch.equal(a.optimizer.arena.weights, other.optimizer.arena.weights)  # the setting is the base's


@pytest.mark.parametrize(
    ("extra", "claimed"),
    [
        ("SGD", 4),
        ('SGD_MOMENTUM="0.0"\nCONFIG_OPT_SGD', 0),
        ("ADAM", 8),
        ("ADAMW", 8),
        ("ADAMWADV", 12),
        ("ADAMWSPAM", 8),
        ("ADAMWSPAM=y\nCONFIG_OPT_ADAMWSPAM_PROFILE_LAB", 12),
        ("ADAMWPRUNE=y\nCONFIG_OPT_ADAMWPRUNE_BASE_ADAMWADV", 12),
    ],
)
def test_state_takes_the_bytes_that_are_claimed(extra, claimed):
    cfg, built, _ = made(f"CONFIG_OPT_{extra}=y\n", 16)
    (clause,) = cfg.optim.contracts()
    assert clause.judge(built)["ok"] and cfg.optim.state_bytes == claimed
    built.optimizer.zeros("more")
    assert not clause.judge(built)["ok"]


def test_adam_has_no_decay_by_default_and_sgd_a_rate_of_its_own():
    rates = {}
    for name in ("ADAM", "ADAMW", "SGD", "ADAMWPRUNE=y\nCONFIG_OPT_ADAMWPRUNE_BASE_ADAM"):
        section = made(f"CONFIG_OPT_{name}=y\n", 16)[0].optim.section
        rates[name] = section.weight_decay, section.lr
    assert list(rates.values()) == [(0.0, 6e-4), (0.1, 6e-4), (0.1, 0.1), (0.0, 6e-4)]


def test_nesterov_needs_momentum():
    with pytest.raises(ValueError, match="CONFIG_OPT_SGD_NESTEROV = y : needs momentum"):
        made('CONFIG_OPT_SGD=y\nCONFIG_OPT_SGD_NESTEROV=y\nCONFIG_OPT_SGD_MOMENTUM="0.0"\n', 16)
