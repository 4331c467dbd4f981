# SPDX-License-Identifier: MIT
"""Multi-head attention (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762): one Linear gives q, k and v.

B batch, T tokens, D model, H heads, K key dim.
"""

from torch import Tensor

from ablab.attention import Attention
from ablab.tensor.stage import CAUSAL, Ctx, Dims, Field, Heads, Linear, Part, Piece, Project


class Qkv(Project):
    """Rows of the weight: q, k, v, each head by head, as in GPT-2."""

    caches = ("k", "v")

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.n_head, self.head_dim = dims.n_head, dims.head_dim
        self.scale = dims.head_dim**-0.5
        self.qkv = Linear(dims.n_embd, 3 * dims.n_embd, dims.bias)

    def forward(self, x_BTD: Tensor, ctx: Ctx) -> tuple[Heads, Ctx]:
        B, T, _ = x_BTD.shape
        qkv = self.qkv(x_BTD.flatten(0, 1)).view(B, T, 3, self.n_head, self.head_dim)  # flat: fewer views in Linear
        q, k, v = qkv.unbind(2)  # here its backward is one stack in the layout of the Linear, and no copy more
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # BHTK
        pieces = (Piece(q, (Field("k", k),), CAUSAL),)
        return Heads(q, k, v, self.scale, pieces, Field("v", v)), ctx


class Mha(Attention, symbol="ATTN_MHA"):
    """The projector of GPT-2."""

    def size(self, dims: Dims) -> int:
        return 3 * dims.n_embd * (dims.n_embd + dims.bias)

    def parts(self, dims: Dims) -> tuple[Part, ...]:
        return (Qkv(dims),)
