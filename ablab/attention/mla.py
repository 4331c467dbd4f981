# SPDX-License-Identifier: MIT
"""Multi-head latent attention (DeepSeek-AI 2024, https://arxiv.org/abs/2405.04434): k and v come from latents.

B batch, T tokens, D model, H heads, K key dim, V value dim, C channels of a head (K = V), L latent.

Differs from the paper: q has no latent, there is no rotary part, and the values have a latent of their own.

Init:
    q.weight  dk.weight  dv.weight    N(0, 0.02)
    up_k  up_v                        N(0, 1 / sqrt(L)): k and v start with the variance of ATTN_MHA
    q.bias                            0; k needs none, the softmax ignores it, and that of v is the output's
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ablab.attention import Attention
from ablab.tensor.stage import (
    CAUSAL,
    Ctx,
    Dims,
    Factors,
    Field,
    Gauges,
    Heads,
    Latent,
    LatentDelta,
    Linear,
    Part,
    Piece,
    Project,
)


class Latents(Project):
    """Keys and values of the new tokens are expanded; decode caches the latents and absorbs the expansions."""

    takes = (LatentDelta,)
    emits = (Latent,)
    gauges = ("latent_std",)

    def __init__(self, dims: Dims, latent: int, n_head_k: int, n_head_v: int, tie_kv: bool) -> None:
        super().__init__()
        self.n_head, self.head_dim = dims.n_head, dims.head_dim
        self.scale = dims.head_dim**-0.5
        self.q = Linear(dims.n_embd, dims.n_embd, dims.bias)
        self.dk = Linear(dims.n_embd, latent, bias=False)
        self.dv = None if tie_kv else Linear(dims.n_embd, latent, bias=False)
        self.up_k = nn.Parameter(torch.empty(n_head_k, dims.head_dim, latent))
        self.up_v = nn.Parameter(torch.empty(n_head_v, latent, dims.head_dim))
        self.std = dict.fromkeys(("up_k", "up_v"), latent**-0.5)
        self.caches = ("c_k",) if tie_kv else ("c_k", "c_v")

    def forward(self, x_BTD: Tensor, ctx: Ctx) -> tuple[Heads, Ctx]:
        q_BHTK = self.q(x_BTD).unflatten(-1, (self.n_head, self.head_dim)).transpose(1, 2)
        c_BTL = self.dk(x_BTD)
        for delta in ctx.all(LatentDelta):
            c_BTL = c_BTL + delta.d_BTL
        for g in ctx.all(Gauges):
            g.put(ctx, self, latent_std=c_BTL.std())
        k = self.field(self.caches[0], c_BTL, self.up_k.mT)
        v = self.field(self.caches[-1], c_BTL if self.dv is None else self.dv(x_BTD), self.up_v)
        pieces = (Piece(q_BHTK, (k,), CAUSAL),)
        return Heads(q_BHTK, k.new_BHTC, v.new_BHTC, self.scale, pieces, v), ctx.put(Latent(c_BTL))

    def field(self, name: str, c_BTL: Tensor, up_HLC: Tensor) -> Field:
        new_BHTC = torch.einsum("btl,hlc->bhtc", c_BTL, up_HLC).expand(-1, self.n_head, -1, -1)
        return Field(name, new_BHTC, Factors(c_BTL[:, None], up_HLC))


class Mla(Attention, symbol="ATTN_MLA"):
    """The projector with latents."""

    scales = {"latent": "width"}

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """ATTN_MLA_*."""

        latent: int
        """Width L."""
        per_head_k: bool
        """Each head has its own map from latent to k."""
        per_head_v: bool
        """Each head has its own map from latent to v."""
        tie_kv: bool
        """k and v come from one latent."""

    def latent(self) -> int:
        return self.config.latent

    def _heads(self, dims: Dims) -> tuple[int, int]:
        """How many maps to k, and to v, there are."""
        return dims.n_head if self.config.per_head_k else 1, dims.n_head if self.config.per_head_v else 1

    def size(self, dims: Dims) -> int:
        down, up = dims.n_embd * (1 if self.config.tie_kv else 2), dims.head_dim * sum(self._heads(dims))
        return dims.n_embd * (dims.n_embd + dims.bias) + self.config.latent * (down + up)

    def parts(self, dims: Dims) -> tuple[Part, ...]:
        return (Latents(dims, self.config.latent, *self._heads(dims), self.config.tie_kv),)
