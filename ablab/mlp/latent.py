# SPDX-License-Identifier: MIT
"""Latent reciprocity: the key latent enriches the hidden layer, which amends the key latent of the next block.

    h += lam a c W^T;  in the next block  c += lam a h W'

B batch, T tokens, H heads, F hidden, L latent.
"""

from dataclasses import dataclass
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablab.mlp import Mlp, check_divides
from ablab.tensor.stage import Coupling, Ctx, Dims, Emit, Enrich, Gauges, LatentDelta, Part, share
from ablab.tensor.stage import Latent as KeyLatent


class Tying(Enum):
    """What W' is."""

    TIED_TRANSPOSE = "tied_transpose"
    UNTIED = "untied"
    PER_HEAD_SCALAR = "per_head_scalar"


def spread(s_H: Tensor, width: int) -> Tensor:
    """Each scalar on its chunk of `width`."""
    return s_H[:, None].expand(-1, width // s_H.shape[0]).flatten()


class EnrichHidden(Enrich):
    """Attention to MLP, in the same block."""

    reads = (Coupling, KeyLatent)
    gauges = ("term_rms",)

    def __init__(self, dims: Dims, alpha: float, tying: Tying) -> None:
        super().__init__()
        self.alpha, self.per_head = alpha, tying is Tying.PER_HEAD_SCALAR
        self.lat_w = nn.Parameter(torch.zeros(dims.mlp_hidden, dims.latent))
        if self.per_head:
            self.lat_sm = nn.Parameter(torch.full((dims.n_head,), alpha))

    def forward(self, h_BTF: Tensor, ctx: Ctx) -> Tensor:
        a = spread(self.lat_sm, h_BTF.shape[-1])[:, None] if self.per_head else self.alpha
        term_BTF = F.linear(ctx.one(KeyLatent).c_BTL, ctx.one(Coupling).lam * a * self.lat_w)
        for g in ctx.all(Gauges):
            g.put(ctx, self, term_rms=share(term_BTF, h_BTF))
        return h_BTF + term_BTF


class EmitDelta(Emit):
    """MLP to attention, in the next block."""

    reads = (Coupling,)
    emits = (LatentDelta,)

    def __init__(self, dims: Dims, alpha: float, tying: Tying, there: EnrichHidden) -> None:
        super().__init__()
        self.alpha, self.per_head = alpha, tying is Tying.PER_HEAD_SCALAR
        self.there = (there,)  # the holder of the one matrix; in a tuple, or it were registered a second time
        if tying is Tying.UNTIED:
            self.lat_d = nn.Parameter(torch.zeros(dims.mlp_hidden, dims.latent))
            self.there = ()
        if self.per_head:
            self.lat_sa = nn.Parameter(torch.full((dims.n_head,), alpha))

    def forward(self, h_BTF: Tensor, ctx: Ctx) -> LatentDelta:
        w_FL = self.there[0].lat_w if self.there else self.lat_d
        a = spread(self.lat_sa, w_FL.shape[1]) if self.per_head else self.alpha
        return LatentDelta(h_BTF @ (ctx.one(Coupling).lam * a * w_FL))


class Latent(Mlp, symbol="MLP_LATENT"):
    """Latent reciprocity."""

    couples = identity = True

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """MLP_LATENT_*."""

        alpha: float
        """Factor a on both terms, or where the scalars start."""
        tying: Tying

    def size(self, dims: Dims) -> int:
        tying, ways = self.config.tying, 1 if dims.last else 2
        matrices = ways if tying is Tying.UNTIED else 1
        return matrices * dims.mlp_hidden * dims.latent + (tying is Tying.PER_HEAD_SCALAR) * ways * dims.n_head

    def flops(self, dims: Dims, length: int) -> int:
        return 0 if dims.last or self.config.tying is Tying.UNTIED else 2 * dims.mlp_hidden * dims.latent  # W twice

    def parts(self, dims: Dims) -> tuple[Part, ...]:
        alpha, tying = self.config.alpha, self.config.tying
        if tying is Tying.PER_HEAD_SCALAR:
            why = "CONFIG_MLP_LATENT_TYING_PER_HEAD_SCALAR has a scalar for each of equal chunks"
            check_divides(dims.n_head, "MLP_GELU_WIDTH", dims.mlp_hidden, why)
            check_divides(dims.n_head, "ATTN_MLA_LATENT", dims.latent, why)
        there = EnrichHidden(dims, alpha, tying)
        return (there,) if dims.last else (there, EmitDelta(dims, alpha, tying, there))
