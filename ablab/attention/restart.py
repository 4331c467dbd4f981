# SPDX-License-Identifier: MIT
"""Self-restart: o <- (1 - a) o + a v, a learned diagonal added to the attention matrix.

Idea: knlp, https://github.com/mcgrof/knlp.

B batch, H heads, T tokens, V value dim.
"""

from dataclasses import dataclass

import torch
from torch import nn

from ablab.attention import Attention
from ablab.tensor.stage import Coupling, Ctx, Dims, Gate, Gauges, Heads, Mixed, Part


class Stay(Gate):
    """y + lam a_h (v - y)."""

    reads = (Coupling,)
    gauges = ("alpha",)

    def __init__(self, dims: Dims, alpha: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.full((dims.n_head,), alpha))

    def forward(self, m: Mixed, h: Heads, ctx: Ctx) -> tuple[Mixed, Ctx]:
        for g in ctx.all(Gauges):
            g.put(ctx, self, alpha=self.a.mean())
        a_H11 = (ctx.one(Coupling).lam * self.a)[:, None, None]
        return m._replace(y_BHTV=m.y_BHTV + a_H11 * (h.v_BHTV - m.y_BHTV)), ctx


class Restart(Attention, symbol="ATTN_RESTART"):
    """A share of each token's own value."""

    couples = True

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """ATTN_RESTART_*."""

        alpha: float
        """Share a at first."""

    @property
    def identity(self) -> bool:
        return self.config.alpha == 0

    def size(self, dims: Dims) -> int:
        return dims.n_head

    def flops(self, dims: Dims, length: int) -> int:
        return 3 * dims.n_embd

    def parts(self, dims: Dims) -> tuple[Part, ...]:
        return (Stay(dims, self.config.alpha),)
