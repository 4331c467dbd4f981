# SPDX-License-Identifier: MIT
"""Cross-token routing: the hidden layer of a block offers channels that the attention of the next one routes.

    z = Wd h;  in the next block  routed_h = P_h z_h,  h += lam ALPHA Wu routed

The channels ride along as values of the one attention call.  A sparse P takes a second pass.

B batch, T tokens, H heads, F hidden, R offered channels, C = R / H channels of a head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablab.mlp import Mlp, check_divides
from ablab.tensor.sparse import above_rms, largest, mix
from ablab.tensor.stage import Coupling, Ctx, Dims, Emit, Enrich, Field, Gate, Gauges, Heads, Mixed, Part, Score, share


class Sparse(Enum):
    """Which entries of a row of P route."""

    NONE = "none"
    TOPK = "topk"
    RMS = "rms"


class Offer(NamedTuple):
    """Carried to the next block: channels to route."""

    z_BTR: Tensor

    def field(self, n_head: int) -> Field:
        """Each head has its own channels."""
        return Field("z", self.z_BTR.unflatten(-1, (n_head, -1)).transpose(1, 2))


class Routed(NamedTuple):
    """Channels after routing, for the MLP of the same block."""

    z_BTR: Tensor


class MakeOffer(Emit):
    """F to R."""

    emits = (Offer,)
    std = {"z_down": 0.02}

    def __init__(self, dims: Dims, rank: int) -> None:
        super().__init__()
        self.z_down = nn.Parameter(torch.empty(rank, dims.mlp_hidden))

    def forward(self, h_BTF: Tensor, ctx: Ctx) -> Offer:
        return Offer(F.linear(h_BTF, self.z_down))


class Ride(Score):
    """The offer beside the values."""

    reads = (Offer,)
    caches = ("z",)

    def forward(self, h: Heads, ctx: Ctx) -> Heads:
        return h._replace(side={**h.side, Offer: ctx.one(Offer).field(h.q_BHTK.shape[1])})


class RideSparse(Ride):
    """The offer by rows of P that keep a few entries, in a pass of its own: after MLP parts no piece changes."""

    def __init__(self, mix: Callable[[Heads, Ctx, Field], Tensor]) -> None:
        super().__init__()
        self.mix = mix

    def forward(self, h: Heads, ctx: Ctx) -> Heads:
        return h._replace(mixed={**h.mixed, Offer: self.mix(h, ctx, ctx.one(Offer).field(h.q_BHTK.shape[1]))})


class Land(Gate):
    """What the rows of P made of the offer."""

    emits = (Routed,)

    def forward(self, m: Mixed, h: Heads, ctx: Ctx) -> tuple[Mixed, Ctx]:
        return m, ctx.put(Routed(m.side[Offer].transpose(1, 2).flatten(2)))


class AddRouted(Enrich):
    """R to F."""

    reads = (Coupling, Routed)
    gauges = ("term_rms",)

    def __init__(self, dims: Dims, rank: int, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha
        self.z_up = nn.Parameter(torch.zeros(dims.mlp_hidden, rank))

    def forward(self, h_BTF: Tensor, ctx: Ctx) -> Tensor:
        term_BTF = F.linear(ctx.one(Coupling).lam * self.alpha * ctx.one(Routed).z_BTR, self.z_up)
        for g in ctx.all(Gauges):
            g.put(ctx, self, term_rms=share(term_BTF, h_BTF))
        return h_BTF + term_BTF


class Cross(Mlp, symbol="MLP_CROSS"):
    """Cross-token routing."""

    couples = identity = True
    scales = {"rank": "width", "sparse_k": "keys"}

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """MLP_CROSS_*."""

        rank: int
        """Channels R, shared equally between the heads."""
        alpha: float
        """Factor on the added term."""
        sparse: Sparse
        sparse_k: int | None
        """Entries per row."""
        sparse_tau: float | None
        """Least entry over the RMS of its row."""
        sparse_normalise: bool | None
        """What is left of a row sums to 1 again."""

    def size(self, dims: Dims) -> int:
        return (2 - dims.first - dims.last) * self.config.rank * dims.mlp_hidden

    def flops(self, dims: Dims, length: int) -> int:
        if dims.first:
            return 0
        routing = 2 * length * self.config.rank
        return routing if self.config.sparse is Sparse.NONE else routing + 2 * length * dims.n_embd + dims.dearer

    def parts(self, dims: Dims) -> tuple[Part, ...]:
        c = self.config
        check_divides(dims.n_head, "MLP_CROSS_RANK", c.rank, "each head routes an equal share")
        keep = {Sparse.TOPK: partial(largest, c.sparse_k), Sparse.RMS: partial(above_rms, c.sparse_tau)}.get(c.sparse)
        second = partial(mix, keep=keep, normalise=c.sparse_normalise)
        ride = Ride() if keep is None else RideSparse(second)
        consume = () if dims.first else (ride, Land(), AddRouted(dims, c.rank, c.alpha))
        return consume if dims.last else (*consume, MakeOffer(dims, c.rank))
