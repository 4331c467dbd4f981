# SPDX-License-Identifier: MIT
"""SPAM against a loop over the formulas in float64, and what its additions must and must not do."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from ablab import checkpoint
from ablab.optim import Impl
from ablab.optim.adamwspam import FlatSpam, Profile, Settings
from ablab.rundir import Checkpoint

PAPER = Settings(
    profile=Profile.PAPER,
    beta1=0.9,
    beta2=0.95,
    eps=1e-6,
    theta=5000.0,
    interval=500,
    rewarm=150,
    grace=20,
    spike_z=None,
    history=None,
    amsgrad=None,
)
LAB = replace(
    PAPER, profile=Profile.LAB, eps=1e-8, theta=50.0, interval=1000, rewarm=100, spike_z=2.0, history=100, amsgrad=True
)
N, LR, DECAY = 500, 0.01, 0.1


def build(c, impl=Impl.FUSED, dtype=torch.float64, n=N):
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(n, dtype=dtype))
    return w, FlatSpam([{"name": "decay", "params": [w], "weight_decay": DECAY, "lr": LR}], c, impl)


def gradient(t, n=N):
    g = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
    if t % 37 == 0:
        g[::7] *= 400
    return g


def run(optimizer, steps, clip=0.0, start=1):
    for t in range(start, start + steps):
        n = optimizer.size
        optimizer.arena.grads[:n] = gradient(t, n)
        optimizer.gate(torch.tensor(1.0), clip, t)
        optimizer.step()


def paper(c, w, steps):
    """The rule as published."""
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    D, W, G = c.interval, c.rewarm, c.grace
    for t in range(1, steps + 1):
        g = gradient(t)
        if D and t % D == 0:
            m, v = torch.zeros_like(w), torch.zeros_like(w)
        j = t % D if D and t >= D else W
        phi = 1 - 0.495 * (1 + math.cos(math.pi * j / (W + 1))) if j < W else 1
        if c.theta and t >= G and (D == 0 or t % D >= G):
            g = torch.where(g * g > c.theta * v, g.sign() * (c.theta * v).sqrt(), g)
        m, v = c.beta1 * m + (1 - c.beta1) * g, c.beta2 * v + (1 - c.beta2) * g * g
        w = w - LR * phi * math.sqrt(1 - c.beta2**t) / (1 - c.beta1**t) * m / (v.sqrt() + c.eps)
        w = w - LR * DECAY * w
    return w


def lab(c, w, steps, clip):
    """The mended rule; also the share of soft resets."""
    m, v, x, r, norms, soft = torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(w), 0, [], 0
    for t in range(1, steps + 1):
        g = gradient(t)
        if c.interval and t % c.interval == 0:
            m, v, x, r = torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(w), t - 1
        age, j = t - r, t % c.interval if c.interval and t >= c.interval else c.rewarm
        phi = max(1e-3, (1 - math.cos(math.pi * j / c.rewarm)) / 2) if j < c.rewarm else 1
        if c.theta and age > c.grace:
            vh = v / (1 - c.beta2 ** (age - 1))
            g = torch.where((vh > 0) & (g * g > c.theta * vh), g.sign() * (c.theta * vh).sqrt(), g)
        n = float(g.norm())
        h, q = torch.tensor(norms[-c.history :], dtype=torch.float64), 0.0
        if c.spike_z and len(h) >= 10 and h.std(correction=0) > 0:
            q = float(n - h.mean() > c.spike_z * h.std(correction=0))
        norms.append(n)
        soft += q
        g = g * min(1.0, clip / (n + 1e-6)) if clip else g
        m = c.beta1 * (1 - 0.5 * q) * m + (1 - c.beta1) * g
        v = c.beta2 * (1 - 0.1 * q) * v + (1 - c.beta2) * g * g
        x = torch.maximum((1 - 0.1 * q) * x, v) if c.amsgrad else v
        w = w * (1 - LR * DECAY)
        w = w - LR * phi * (m / (1 - c.beta1**age)) / ((x / (1 - c.beta2**age)).sqrt() + c.eps)
    return w, soft / steps


@pytest.mark.parametrize("impl", [Impl.FUSED, Impl.LOOP])
def test_paper_equals_the_formula(impl):
    c = replace(PAPER, beta2=0.999)
    w, optimizer = build(c, impl)
    want, off = (paper(d, w.detach().clone(), 1200) for d in (c, replace(c, theta=0.0)))
    run(optimizer, 1200)
    assert torch.allclose(w, want, rtol=0, atol=1e-12)
    assert (w - off).abs().max() > 0.05  # clipping matters here


@pytest.mark.parametrize("clip", [0.0, 5.0])
@pytest.mark.parametrize("amsgrad", [True, False])
def test_lab_equals_the_formula(clip, amsgrad):
    c = replace(LAB, interval=300, amsgrad=amsgrad)
    w, optimizer = build(c)
    want, soft = lab(c, w.detach().clone(), 700, clip)
    run(optimizer, 700, clip)
    assert torch.allclose(w, want, rtol=0, atol=1e-6 if clip else 1e-12)  # torch's kernels take the clip in fp32
    assert soft > 0.01 and optimizer.gauges()["soft_reset_frac"] == pytest.approx(soft, abs=1e-12)


def test_with_everything_off_lab_is_adamw_of_torch():
    w, optimizer = build(replace(LAB, theta=0.0, interval=0, spike_z=0.0))
    twin = nn.Parameter(w.detach().clone())
    wanted = torch.optim.AdamW([twin], lr=LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=DECAY, amsgrad=True)
    run(optimizer, 300)
    for t in range(1, 301):
        twin.grad = gradient(t)
        wanted.step()
    assert torch.allclose(w, twin, rtol=0, atol=1e-12)


def test_the_rate_after_a_reset_is_the_published_one():
    _, optimizer = build(PAPER)
    phis = []
    for optimizer.number in range(1, 1001):
        phis.append(optimizer._phi())
    assert phis[499] == pytest.approx(0.01) and set(phis[:499]) == {1.0}
    assert sum(phis[499:999]) / 500 == pytest.approx(0.8495, abs=1e-4)
    lab_phis = []
    _, optimizer = build(LAB)
    for optimizer.number in range(1000, 2000):
        lab_phis.append(optimizer._phi())
    assert sum(lab_phis) / 1000 == pytest.approx(0.9495, abs=1e-4)


def test_no_constant_gradient_stays_clipped():
    for size in (1e-6, 1e-3, 1.0):
        w, optimizer = build(LAB, n=64)
        for t in range(1, 60):
            optimizer.arena.grads[:64] = size
            optimizer.gate(torch.tensor(1.0), 0.0, t)
            assert not optimizer.spikes, (size, t)
            optimizer.step()


def test_normal_gradients_are_rarely_touched():
    _, optimizer = build(LAB, n=2000)
    for t in range(1, 901):
        optimizer.arena.grads[:2000] = torch.randn(2000, generator=torch.Generator().manual_seed(t))
        optimizer.gate(torch.tensor(1.0), 0.0, t)
        optimizer.step()
    found = optimizer.gauges()
    assert found["spike_frac"] <= 1e-3 and found["soft_reset_frac"] == pytest.approx(0.024, abs=0.01)
    assert optimizer.gauges() == {}  # they were read


def test_what_never_moved_may_start_in_lab_and_not_in_paper():
    for c, moves in ((LAB, True), (PAPER, False)):
        w, optimizer = build(c, n=64)
        for t in range(1, 31):
            g = torch.randn(64, generator=torch.Generator().manual_seed(t)).double()
            g[5] = 1.0 if t > 25 else 0.0
            optimizer.arena.grads[:64] = g
            optimizer.gate(torch.tensor(1.0), 0.0, t)
            optimizer.step()
        assert bool(optimizer.flats["exp_avg"][5]) is moves


@pytest.mark.parametrize("c", [replace(PAPER, interval=0, eps=1e-12), replace(LAB, interval=0, spike_z=0.0)])
@pytest.mark.parametrize("rest", [0, 40])
def test_a_group_that_rested_starts_as_one_that_is_new(c, rest):
    """Its grace and what its clip compares with are counted in steps of its own."""
    (w, alone), (u, _), lam = build(c), build(c), torch.zeros(())
    other = nn.Parameter(torch.randn(N, dtype=torch.float64))
    plain, coupled = {"name": "decay", "params": [other]}, {"name": "coupled_decay", "params": [u], "lam": lam}
    both = FlatSpam([g | {"weight_decay": DECAY, "lr": LR} for g in (plain, coupled)], c, Impl.FUSED)
    run(alone, 100)
    for t in range(1, rest + 101):
        lam.fill_(float(t > rest))
        other.grad.copy_(gradient(t))
        if t > rest:
            u.grad.copy_(gradient(t - rest))
        both.gate(torch.tensor(1.0), 0.0, t)
        both.step()
    assert torch.allclose(w, u, rtol=0, atol=1e-9)


def test_moments_are_zero_after_a_reset():
    for c in (replace(PAPER, interval=40, rewarm=20), replace(LAB, interval=40, rewarm=20)):
        _, optimizer = build(c)
        run(optimizer, 40)
        g = gradient(40)
        assert torch.allclose(optimizer.flats["exp_avg"][:N], 0.1 * g)
        assert torch.allclose(optimizer.flats["exp_avg_sq"][:N], 0.05 * g * g)
        if c.amsgrad:
            assert torch.equal(optimizer.flats["max_exp_avg_sq"], optimizer.flats["exp_avg_sq"])
        assert float(optimizer.count) == (1 if c.profile is Profile.LAB else 40)


@pytest.mark.parametrize("c", [replace(PAPER, interval=30, rewarm=10), replace(LAB, interval=30, rewarm=10)])
@pytest.mark.parametrize("t", [25, 30])  # 30 is a reset
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_nothing_is_applied_that_is_not_finite(c, t, poison):
    _, optimizer = build(c, dtype=torch.float32)
    run(optimizer, t - 1)
    kept = [optimizer.arena.weights, *(x for s in optimizer.state.values() for x in s.values())]
    before = [x.clone() for x in kept]
    optimizer.arena.grads[:N] = gradient(t)
    optimizer.arena.grads[3] = poison
    optimizer.gate(torch.tensor(1.0), 1.0, t)
    optimizer.step()
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(kept, before, strict=True))
    assert optimizer.found_inf == 1


@pytest.mark.parametrize("c", [replace(PAPER, interval=40, rewarm=20), replace(LAB, interval=40, rewarm=20)])
@pytest.mark.parametrize("at", [39, 40, 41])
def test_resume_around_a_reset_is_bitwise_equal(tmp_path, c, at):
    class Holder(nn.Module):
        def __init__(self, w):
            super().__init__()
            self.w = w

    (w, a), (u, b) = (build(c, dtype=torch.float32) for _ in range(2))
    run(a, at, 1.0)
    place = Checkpoint(tmp_path / "step", 1, 1)
    checkpoint.save(place, Holder(w), a, {})
    checkpoint.load(place, Holder(u), b)
    for optimizer in (a, b):
        run(optimizer, 30, 1.0, start=at + 1)
    assert torch.equal(w, u) and a.gauges() == b.gauges()
    for x, y in zip(a.state[w].values(), b.state[u].values(), strict=True):
        assert torch.equal(x.nan_to_num(), y.nan_to_num())


def test_no_step_reads_the_device(monkeypatch):
    """On the meta device a value cannot be read."""
    w, u = (nn.Parameter(torch.zeros(1 << 10, device="meta")) for _ in range(2))
    from ablab.optim import adamwspam

    monkeypatch.setitem(adamwspam.CHUNK, "meta", 1 << 8)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda t: True))
    for c in (PAPER, LAB):
        groups = [{"name": "decay", "params": [w]}, {"name": "coupled_decay", "params": [u], "lam": w.new_zeros(())}]
        optimizer = FlatSpam([g | {"weight_decay": DECAY, "lr": LR} for g in groups], c, Impl.FUSED)
        monkeypatch.setattr(optimizer, "apply", lambda rates, rule: None)  # it has no meta form
        for t in (1, 30, c.interval, c.interval + 30):
            optimizer.gate(torch.zeros((), device="meta"), 1.0, t)
            optimizer.step()
        with pytest.raises(RuntimeError):
            optimizer.gauges()  # the guard sees a read


def test_a_rewarm_longer_than_half_the_interval_is_refused():
    with pytest.raises(ValueError, match="CONFIG_OPT_ADAMWSPAM_REWARM = 151 : more than half"):
        replace(PAPER, interval=300, rewarm=151)
    assert replace(PAPER, interval=0, rewarm=151)


def test_a_grace_that_never_lets_a_weight_move_is_refused():
    with pytest.raises(ValueError, match="CONFIG_OPT_ADAMWSPAM_GRACE = 1 : the first step"):
        replace(PAPER, grace=1)
    assert replace(LAB, grace=1) and replace(PAPER, grace=1, theta=0.0)
    w, optimizer = build(replace(PAPER, grace=2))
    before = w.detach().clone()
    run(optimizer, 3)
    assert (w != before * (1 - LR * DECAY) ** 3).all()
