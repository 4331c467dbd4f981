# SPDX-License-Identifier: MIT
"""Multi-head attention (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762): one Linear gives q, k and v.

B batch, T tokens, D model, H heads, K key dim.
"""

from dataclasses import dataclass

from torch import Tensor

from ablab.attention import Attention
from ablab.tensor.stage import CAUSAL, Ctx, Dims, Field, Heads, Linear, Part, Piece, Project


class Qkv(Project):
    """Rows of the weight: q, k, v, each head by head, as in GPT-2; without v when the keys are the values."""

    def __init__(self, dims: Dims, tie_kv: bool) -> None:
        super().__init__()
        self.n_head, self.head_dim = dims.n_head, dims.head_dim
        self.scale = dims.head_dim**-0.5
        self.caches = ("k",) if tie_kv else ("k", "v")
        self.qkv = Linear(dims.n_embd, (1 + len(self.caches)) * dims.n_embd, dims.bias)

    def forward(self, x_BTD: Tensor, ctx: Ctx) -> tuple[Heads, Ctx]:
        B, T, _ = x_BTD.shape
        qkv = self.qkv(x_BTD.flatten(0, 1)).view(B, T, -1, self.n_head, self.head_dim)  # flat: fewer views in Linear
        # unbind: here its backward is one stack in the layout of the Linear, and no copy more
        q, *kv = [t.transpose(1, 2) for t in qkv.unbind(2)]  # BHTK
        k, v = kv[0], kv[-1]
        pieces = (Piece(q, (Field("k", k),), CAUSAL),)
        return Heads(q, k, v, self.scale, pieces, Field(self.caches[-1], v)), ctx


class Mha(Attention, symbol="ATTN_MHA"):
    """The projector of GPT-2."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """ATTN_MHA_*."""

        tie_kv: bool
        """Values are the keys."""

    def size(self, dims: Dims) -> int:
        return (2 if self.config.tie_kv else 3) * dims.n_embd * (dims.n_embd + dims.bias)

    def parts(self, dims: Dims) -> tuple[Part, ...]:
        return (Qkv(dims, self.config.tie_kv),)
