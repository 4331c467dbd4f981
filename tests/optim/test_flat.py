# SPDX-License-Identifier: MIT
"""Flat storage: what lies in one buffer is still every parameter's own."""

import math

import pytest
import torch
from torch import nn

from ablab.optim import Impl
from ablab.optim._flat import ALIGN, Arena
from ablab.optim.adamw import FlatAdamW


def model(n_in=17, n_hidden=33):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(n_in, n_hidden), nn.GELU(), nn.Linear(n_hidden, 16))


def groups(net):
    matrices, vectors = ([p for p in net.parameters() if (p.ndim > 1) is big] for big in (True, False))
    return [
        {"name": "decay", "params": matrices, "weight_decay": 0.1, "lr": 1e-3},
        {"name": "plain", "params": vectors, "weight_decay": 0.0, "lr": 1e-3},
    ]


def test_parameters_keep_their_values_and_become_views():
    net, twin = model(), model()
    arena = Arena(groups(net))
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
        assert p.untyped_storage().data_ptr() == arena.weights.untyped_storage().data_ptr()
        assert p.data_ptr() % (4 * ALIGN) == arena.weights.data_ptr() % (4 * ALIGN)
    assert sum(s.stop - s.start for s in arena.spans) == len(arena.weights)


def test_backward_adds_into_the_flat_gradients():
    net, twin = model(), model()
    arena, x = Arena(groups(net)), torch.randn(4, 17)
    for _ in range(2):
        net(x).square().mean().backward()
        twin(x).square().mean().backward()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
        assert torch.equal(arena.view(arena.grads, p), q.grad)


def test_norm_and_clip_are_those_of_torch():
    net, twin = model(), model()
    optimizer, x = FlatAdamW(groups(net), 0.9, 0.95, 1e-8, Impl.FUSED), torch.randn(4, 17)
    loss = net(x).square().sum()
    loss.backward()
    twin(x).square().sum().backward()
    norm = optimizer.gate(loss.detach(), 1.0)
    wanted = nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
    assert norm > 1 and torch.isclose(norm, wanted, rtol=1e-6)  # another order of additions
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p.grad / optimizer.grad_scale, q.grad, rtol=1e-5)


def test_the_norm_of_many_gradients_is_exact():
    net = nn.Linear(1 << 12, (1 << 12) - 3, bias=False, device="meta").to_empty(device="cpu")
    everything = [{"name": "decay", "params": [net.weight], "weight_decay": 0.0, "lr": 0.0}]
    optimizer = FlatAdamW(everything, 0.9, 0.95, 1e-8, Impl.FUSED)
    net.weight.grad.fill_(1e-3)
    norm = float(optimizer.gate(torch.tensor(1.0), 1.0))
    assert math.isclose(norm, 1e-3 * net.weight.numel() ** 0.5, rel_tol=1e-4)  # one fp32 sum is off by 2e-3 and more


def test_a_small_gradient_is_not_scaled():
    net = model()
    optimizer = FlatAdamW(groups(net), 0.9, 0.95, 1e-8, Impl.FUSED)
    assert optimizer.gate(torch.tensor(1.0), 5.0) == 0 and optimizer.grad_scale == 1
    optimizer.gate(torch.tensor(1.0), 0.0)
    assert optimizer.grad_scale is None


@pytest.mark.parametrize("impl", Impl)
@pytest.mark.parametrize("poison", ["nan gradient", "inf gradient", "nan loss", "inf loss"])
def test_nothing_is_applied_that_is_not_finite(impl, poison):
    net = model()
    optimizer = FlatAdamW(groups(net), 0.9, 0.95, 1e-8, impl)
    for _ in range(2):
        net(torch.randn(4, 17)).square().mean().backward()
        optimizer.gate(torch.tensor(1.0), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    flats = [optimizer.arena.weights, optimizer.count, *(t for s in optimizer.state.values() for t in s.values())]
    before = [t.clone() for t in flats]
    value, what = poison.split()
    optimizer.arena.grads.fill_(0.1)
    if what == "gradient":
        optimizer.arena.grads[3] = float(value)
    optimizer.gate(torch.tensor(float(value) if what == "loss" else 1.0), 1.0)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(flats, before, strict=True))
    optimizer.arena.grads.fill_(0.1)
    optimizer.gate(torch.tensor(1.0), 1.0)
    optimizer.step()
    assert not torch.equal(flats[0], before[0]) and optimizer.count == 3


def test_gaps_stay_zero_and_gradients_stay_views():
    net = model()
    optimizer = FlatAdamW(groups(net), 0.9, 0.95, 1e-8, Impl.FUSED)
    for _ in range(3):
        net(torch.randn(4, 17)).square().mean().backward()
        optimizer.gate(torch.tensor(1.0), 0.0)
        optimizer.step()
        optimizer.zero_grad()
    inside = torch.zeros_like(optimizer.arena.weights)
    for p in net.parameters():
        optimizer.arena.view(inside, p).fill_(1)
        assert p.grad is not None and not p.grad.any()
    assert not optimizer.arena.weights[inside == 0].any()
    assert int(inside.sum()) == sum(p.numel() for p in net.parameters()) < len(inside)


def test_the_step_count_does_not_depend_on_the_loss_scale():
    optimizer = FlatAdamW(groups(model()), 0.9, 0.95, 1e-8, Impl.FUSED)
    optimizer.gate(torch.tensor(math.pi), 1.0)
    optimizer.step()
    assert all(s["step"] == 1 for s in optimizer.state.values())


@pytest.mark.parametrize("impl", [Impl.FUSED, Impl.FOREACH])
def test_doubles_take_the_step_of_torch(impl):
    net, twin = model().double(), model().double()
    optimizer, x = FlatAdamW(groups(net), 0.9, 0.95, 1e-8, impl), torch.randn(4, 17, dtype=torch.float64)
    other = torch.optim.AdamW(groups(twin), betas=(0.9, 0.95), eps=1e-8)
    for _ in range(3):
        for each, step in ((net, optimizer), (twin, other)):
            loss = each(x).square().mean()
            loss.backward()
            if each is net:
                optimizer.gate(loss.detach(), 0.0)
            step.step()
            step.zero_grad()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-12, atol=1e-12)
