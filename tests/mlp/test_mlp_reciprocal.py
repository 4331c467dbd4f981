# SPDX-License-Identifier: MIT
"""The reciprocal MLP against its formula on a dense model."""

import pytest

from tests.blocks import perturbed, tokens
from tests.mlp.dense import assert_equal, build, logits


@pytest.mark.parametrize("width", [5, 128])
def test_logits_and_gradients_equal_the_dense_formula(width):
    net, x = perturbed(build(symbols=["MLP_RECIPROCAL"], MLP_RECIPROCAL_WIDTH=width).double(), 0.2), tokens(2, 40)
    net.lam.fill_(0.7)

    def pre(layer, p, z, y):
        z = z.clone()
        z[..., 128 - width :] += 0.7 * y @ p["mlp.pre.reciprocal.recip_w"].T
        return z

    assert_equal(net, x, logits(net, x, pre=pre))


def test_more_units_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"MLP_RECIPROCAL_WIDTH = 129 exceeds CONFIG_MLP_GELU_WIDTH = 128 .* 128 or"):
        build(symbols=["MLP_RECIPROCAL"], MLP_RECIPROCAL_WIDTH=129)
