# SPDX-License-Identifier: MIT
"""The GELU MLP against closed forms."""

import math

import pytest
import torch

from ablab.tensor.stage import Ctx
from tests.blocks import network, perturbed


def exact(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def tanh(x):
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize(("form", "other", "flag"), [(exact, tanh, False), (tanh, exact, True)])
def test_mlp_equals_its_formula(form, other, flag):
    mlp = perturbed(network(MLP_GELU_TANH=flag).double(), std=0.5).blocks[1].mlp
    x = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pre = x @ mlp.up.weight.T + mlp.up.bias
    got, _ = mlp(x, Ctx())
    assert (got - (form(pre) @ mlp.down.weight.T + mlp.down.bias)).abs().max() < 1e-12
    assert (got - (other(pre) @ mlp.down.weight.T + mlp.down.bias)).abs().max() > 1e-6


def test_width_is_the_symbol():
    assert network(MLP_GELU_WIDTH=48).blocks[0].mlp.up.weight.shape == (48, 32)
