# SPDX-License-Identifier: MIT
"""Attention members: the projector, and mechanisms on scores, rows and head outputs."""

from ablab.tensor.stage import BlockMember


class Attention(BlockMember, family="ATTN"):
    """Base of the attention members; how their parts compose is in `ablab/tensor/stage.py`."""
