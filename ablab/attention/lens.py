# SPDX-License-Identifier: MIT
"""Column bias: s_ij + scale u.k_j, a learned vector per head added to every query, and no bias tensor.

A query bias of the projector is the same function.  Under reciprocal attention u stays out of the key's role, where
it could only move whole rows.  Idea: knlp, https://github.com/mcgrof/knlp.

B batch, H heads, T tokens, K key dim.
"""

import torch
from torch import nn

from ablab.attention import Attention
from ablab.tensor.stage import Coupling, Ctx, Dims, Gauges, Heads, Part, Score


class Tilt(Score):
    """q + lam u in every piece."""

    NO_DECAY = ("u",)
    reads = (Coupling,)
    gauges = ("norm",)

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.zeros(dims.n_head, dims.head_dim))

    def forward(self, h: Heads, ctx: Ctx) -> Heads:
        for g in ctx.all(Gauges):
            g.put(ctx, self, norm=self.u.norm())
        u_H1K = (ctx.one(Coupling).lam * self.u)[:, None]
        return h._replace(pieces=tuple([p._replace(q_BHTK=p.q_BHTK + u_H1K.to(p.q_BHTK.dtype)) for p in h.pieces]))


class Lens(Attention, symbol="ATTN_LENS"):
    """A bias for each key, from the key."""

    couples = identity = True

    def size(self, dims: Dims) -> int:
        return dims.n_embd

    def parts(self, dims: Dims) -> tuple[Part, ...]:
        return (Tilt(dims),)
