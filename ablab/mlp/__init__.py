# SPDX-License-Identifier: MIT
"""MLP members: the hidden layer, and mechanisms that feed it or carry its values to the next block."""

from ablab.tensor.stage import BlockMember


class Mlp(BlockMember, family="MLP"):
    """Base of the MLP members; how their parts compose is in `ablab/tensor/stage.py`."""
