# SPDX-License-Identifier: MIT
"""A group whose coupling strength is 0 rests, under every optimizer."""

import pytest
import torch

from ablab import config, plugin
from ablab.optim import Impl
from ablab.optim.adamw import FlatAdamW
from tests.blocks import values
from tests.optim.test_flat import model

BETAS = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
TORCH = {Impl.FUSED: {"fused": True}, Impl.FOREACH: {"foreach": True}, Impl.LOOP: {"foreach": False}}


def groups(net, lam, weights="decay"):
    """The first layer couples."""
    first, _, last = net
    kinds = {"plain": last.bias, "coupled_plain": first.bias, weights: last.weight, f"coupled_{weights}": first.weight}
    rates = {"plain": 0.0, "coupled_plain": 0.0}
    made = [{"name": n, "params": [p], "weight_decay": rates.get(n, 0.1), "lr": 0.0} for n, p in kinds.items()]
    return [g | ({"lam": lam} if g["name"].startswith("coupled") else {}) for g in made]


def step(net, optimizer, n, rests=False):
    loss = net(torch.randn(8, 32, generator=torch.Generator().manual_seed(n))).square().mean()
    loss.backward()
    for group in optimizer.param_groups:
        group["lr"] = 1e-3 * (n + 1)
    if rests:
        for p in net[0].parameters():
            p.grad.zero_()
    optimizer.gate(loss.detach(), 0.0, n + 1)
    optimizer.step()
    optimizer.zero_grad()


def bits(net, optimizer):
    return [t.clone() for p in net[0].parameters() for t in (p, *optimizer.state[p].values())]


@pytest.mark.parametrize("impl", Impl)
@pytest.mark.parametrize("symbol", plugin.members("OPT"))
def test_a_resting_group_keeps_every_bit_and_moves_afterwards(symbol, impl):
    net, lam = model(32, 64), torch.zeros(())
    (member,) = config.create("OPT", values(**{symbol: True, f"OPT_IMPL_{impl.name}": True}))
    optimizer = member.build(groups(net, lam, "decay" if member.matrix_bytes is None else "matrix"))
    before, other = bits(net, optimizer), net[2].weight.detach().clone()
    for n in range(3):
        step(net, optimizer, n, rests=True)
    assert all(torch.equal(a, b) for a, b in zip(bits(net, optimizer), before, strict=True))
    assert not torch.equal(net[2].weight, other)
    lam.fill_(0.25)
    for n in range(3, 5):
        step(net, optimizer, n)
    assert not any(torch.equal(a, b) for a, b in zip(bits(net, optimizer), before, strict=True))
    assert [float(g["count"]) for g in optimizer.param_groups] == [5, 2, 5, 2]


def test_decay_would_move_it_without_the_strength():
    net = model(32, 64)
    plain = [{k: v for k, v in g.items() if k != "lam"} for g in groups(net, None)]
    optimizer = FlatAdamW(plain, **BETAS, impl=Impl.FUSED)
    before = net[0].weight.detach().clone()
    step(net, optimizer, 0, rests=True)
    assert not torch.equal(net[0].weight, before)


@pytest.mark.parametrize("impl", Impl)
def test_rest_is_what_torch_does_without_a_gradient(impl):
    net, twin, lam = model(32, 64), model(32, 64), torch.zeros(())
    ours = FlatAdamW(groups(net, lam), **BETAS, impl=impl)
    kept = [{k: v for k, v in g.items() if k != "lam"} for g in groups(twin, None)]
    wanted = torch.optim.AdamW(kept, betas=(0.9, 0.95), eps=1e-8, **TORCH[impl])
    for n in range(6):
        lam.fill_(float(n >= 3))
        step(net, ours, n)
        twin(torch.randn(8, 32, generator=torch.Generator().manual_seed(n))).square().mean().backward()
        for group in wanted.param_groups:
            group["lr"] = 1e-3 * (n + 1)
            if n < 3 and group["name"].startswith("coupled"):
                group["params"][0].grad = None
        wanted.step()
        wanted.zero_grad()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(ours.state[p][key], wanted.state[q][key]), key


@pytest.mark.parametrize("impl", Impl)
def test_a_step_that_is_not_finite_is_refused_at_rest_and_at_work(impl):
    net, lam = model(32, 64), torch.zeros(())
    optimizer = FlatAdamW(groups(net, lam), **BETAS, impl=impl)
    for strength in (0.0, 1.0):
        lam.fill_(strength)
        step(net, optimizer, 0)
        before = [*bits(net, optimizer), optimizer.arena.weights.clone()]
        optimizer.arena.grads.fill_(float("inf"))
        optimizer.gate(torch.tensor(1.0), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        after = [*bits(net, optimizer), optimizer.arena.weights]
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
