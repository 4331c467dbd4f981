# SPDX-License-Identifier: MIT
"""AdamW against torch's own and against the formula in float64."""

import subprocess
import sys

import pytest
import torch

from ablab.optim import Impl
from ablab.optim.adamw import FlatAdamW
from tests.optim.test_flat import groups, model

BETA1, BETA2, EPS = 0.9, 0.95, 1e-8
TORCH = {Impl.FUSED: {"fused": True}, Impl.FOREACH: {"foreach": True}, Impl.LOOP: {"foreach": False}}


def train(net, optimizer, steps=6):
    """Steps on fixed data, at a rate that changes."""
    for n in range(steps):
        x = torch.randn(8, 32, generator=torch.Generator().manual_seed(n))
        loss = net(x).square().mean()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (n + 1)
        if isinstance(optimizer, FlatAdamW):
            optimizer.gate(loss.detach(), 0.0)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("impl", Impl)
def test_adamw_equals_torch_bit_for_bit(impl):
    net, twin = model(32, 64), model(32, 64)  # multiples of the vector length; see FlatAdamW
    ours = FlatAdamW(groups(net), BETA1, BETA2, EPS, impl)
    wanted = torch.optim.AdamW(groups(twin), betas=(BETA1, BETA2), eps=EPS, **TORCH[impl])
    train(net, ours)
    train(twin, wanted)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(ours.state[p][key], wanted.state[q][key]), key


@pytest.mark.parametrize("impl", Impl)
def test_one_step_is_the_formula(impl):
    net = model()
    optimizer = FlatAdamW(groups(net), BETA1, BETA2, EPS, impl)
    before = {p: p.detach().double() for p in net.parameters()}
    net(torch.randn(8, 17, generator=torch.Generator().manual_seed(1))).square().mean().backward()
    grads = {p: p.grad.double() for p in net.parameters()}
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    optimizer.gate(torch.tensor(1.0), 0.0)
    optimizer.step()
    for group in optimizer.param_groups:
        for p in group["params"]:
            m, v = (1 - BETA1) * grads[p], (1 - BETA2) * grads[p] ** 2
            step = (m / (1 - BETA1)) / ((v / (1 - BETA2)).sqrt() + EPS)
            wanted = before[p] * (1 - 0.01 * group["weight_decay"]) - 0.01 * step
            assert torch.allclose(p.double(), wanted, rtol=1e-5, atol=1e-7)


def test_building_one_does_not_import_dynamo():
    code = """
import sys, torch
from tests.optim.test_flat import groups, model
from ablab.optim import Impl
from ablab.optim.adamw import FlatAdamW
net = model()
optimizer = FlatAdamW(groups(net), 0.9, 0.95, 1e-8, Impl.FUSED)
net(torch.randn(4, 17)).square().mean().backward()
optimizer.gate(torch.tensor(1.0), 1.0)
optimizer.step()
optimizer.zero_grad()
print("torch._dynamo" in sys.modules)
torch.optim.AdamW(net.parameters())
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]  # the second shows that it would be seen
