# SPDX-License-Identifier: MIT
"""MLP members: the hidden layer, and mechanisms that feed it or carry its values to the next block."""

import torch
from torch import Tensor

from ablab.tensor.stage import BlockMember


class Mlp(BlockMember, family="MLP"):
    """Base of the MLP members; how their parts compose is in `ablab/tensor/stage.py`."""


def share(term: Tensor, target: Tensor) -> Tensor:
    """RMS of a term over that of the target, of equal shape, that it is added to; 0-d, fp32 or better."""
    wide = torch.promote_types(target.dtype, torch.float32)
    return torch.linalg.vector_norm(term, dtype=wide) / torch.linalg.vector_norm(target, dtype=wide)


def check_divides(n_head: int, symbol: str, value: int, why: str) -> None:
    """Raises ValueError unless the heads get equal shares of `value`."""
    if value % n_head:
        low = value // n_head * n_head
        near = f"{low} or {low + n_head}" if low else f"{n_head}"
        raise ValueError(
            f"CONFIG_{symbol} = {value} is no multiple of CONFIG_MODEL_GPT_HEADS = {n_head} : {why}; set {near}"
        )
