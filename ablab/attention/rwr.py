# SPDX-License-Identifier: MIT
"""Random walk with restart (Tong et al. 2006, https://doi.org/10.1109/ICDM.2006.70) on the attention matrix P.

y_0 = a v, y_(m+1) = a v + (1 - a) P y_m, and o <- P v + beta y_K.  P is causal with rows of sum 1, so a walk stays in
the past; it is truncated after K hops, where the paper solves for the limit.  Use in attention: knlp,
https://github.com/mcgrof/knlp.

B batch, H heads, T tokens, V value dim.
"""

from dataclasses import dataclass

import torch
from torch import nn

from ablab.attention import Attention
from ablab.tensor.attend import attend
from ablab.tensor.stage import Coupling, Ctx, Dims, Field, Gauges, Heads, Mixed, Part, Rows, share


class Walk(Rows):
    """y + lam beta_h y_K; the first hop is the y that is there, each further one a call of attend."""

    reads = (Coupling,)
    gauges = ("share", "beta")

    def __init__(self, dims: Dims, alpha: float, hops: int) -> None:
        super().__init__()
        self.alpha = alpha
        self.caches = tuple(f"walk{n}" for n in range(1, hops))
        self.beta = nn.Parameter(torch.zeros(dims.n_head))

    def forward(self, m: Mixed, h: Heads, ctx: Ctx) -> Mixed:
        a, start = self.alpha, self.alpha * h.v_BHTV
        walk_BHTV = start + (1 - a) * a * m.y_BHTV
        for name in self.caches:
            hop, _ = attend(h._replace(value=Field(name, walk_BHTV), side={}), ctx)
            walk_BHTV = start + (1 - a) * hop.y_BHTV
        term_BHTV = (ctx.one(Coupling).lam * self.beta)[:, None, None] * walk_BHTV
        for g in ctx.all(Gauges):
            g.put(ctx, self, share=share(term_BHTV, m.y_BHTV), beta=self.beta.mean())
        return m._replace(y_BHTV=m.y_BHTV + term_BHTV)


class Rwr(Attention, symbol="ATTN_RWR"):
    """Walks of several hops beside the one of attention."""

    couples = identity = True

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """ATTN_RWR_*."""

        alpha: float
        """Probability a to start anew."""
        hops: int
        """Length K of the walk."""

    def size(self, dims: Dims) -> int:
        return dims.n_head

    def flops(self, dims: Dims, length: int) -> int:
        return (self.config.hops - 1) * (4 * length * dims.n_embd + dims.dearer)

    def parts(self, dims: Dims) -> tuple[Part, ...]:
        return (Walk(dims, self.config.alpha, self.config.hops),)
