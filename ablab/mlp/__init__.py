# SPDX-License-Identifier: MIT
"""MLP members: the hidden layer, and mechanisms that feed it or carry its values to the next block."""

from ablab.tensor.stage import BlockMember


class Mlp(BlockMember, family="MLP"):
    """Base of the MLP members; how their parts compose is in `ablab/tensor/stage.py`."""


def check_divides(n_head: int, symbol: str, value: int, why: str) -> None:
    """Raises ValueError unless the heads get equal shares of `value`."""
    if value % n_head:
        low = value // n_head * n_head
        near = f"{low} or {low + n_head}" if low else f"{n_head}"
        raise ValueError(
            f"CONFIG_{symbol} = {value} is no multiple of CONFIG_MODEL_GPT_HEADS = {n_head} : {why}; set {near}"
        )
