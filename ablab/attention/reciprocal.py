# SPDX-License-Identifier: MIT
"""Reciprocal attention: logits s_ij = scale (w_s q_i.k_j + w_r k_i.q_j), the transpose mixed in before the mask.

One attention call on q' = [w_s q | w_r k] and k' = [k | q].  The gates are on the query's side alone: the sign is free
and w_r = 0 has a finite gradient.  A head's map M = Wq Wk^T becomes (w_s + w_r)/2 (M + M^T) + (w_s - w_r)/2 (M - M^T).
Idea: knlp, https://github.com/mcgrof/knlp.

B batch, H heads, T tokens, K key dim.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ablab.attention import Attention
from ablab.plugin import Clause
from ablab.tensor.stage import CAUSAL, Coupling, Ctx, Dims, Field, Gauges, Heads, Part, Piece, Region, Score


class Fold(Score):
    """The causal piece with its reciprocal, over all keys or over the last `window`."""

    reads = (Coupling,)
    caches = ("q",)
    gauges = ("w_s", "w_r", "sym", "anti")

    def __init__(self, dims: Dims, alpha: float, learn: bool, window: int) -> None:
        super().__init__()
        self.learn, self.window = learn, window
        for name, value in (("w_s", 1.0), ("w_r", alpha)):
            w_H = torch.full((dims.n_head,), value)
            if learn:
                self.register_parameter(name, nn.Parameter(w_H))
            else:
                self.register_buffer(name, w_H, persistent=False)

    def forward(self, h: Heads, ctx: Ctx) -> Heads:
        lam = ctx.one(Coupling).lam
        w_s_H, w_r_H = 1 + lam * (self.w_s - 1), lam * self.w_r
        for g in ctx.all(Gauges):
            factors = {"sym": (w_s_H + w_r_H).mean() / 2, "anti": (w_s_H - w_r_H).mean() / 2}
            g.put(ctx, self, w_s=self.w_s.mean(), w_r=self.w_r.mean(), **factors)
        (p,) = h.pieces  # a causal piece leaves no room for another
        q = p.q_BHTK  # a fixed w_s is 1
        if self.learn:
            q = (w_s_H[:, None, None] * q).to(q.dtype)  # a gate is fp32, under autocast too
        k = (w_r_H[:, None, None] * h.k_BHTK).to(p.q_BHTK.dtype)
        both = Piece(torch.cat([q, k], -1), (*p.k, Field("q", h.q_BHTK)), CAUSAL)
        if not self.window:
            return h._replace(pieces=(both,))
        near, far = Region("band", self.window), Region("far", self.window)
        return h._replace(pieces=(both._replace(region=near), Piece(q, p.k, far)))


class Reciprocal(Attention, symbol="ATTN_RECIPROCAL"):
    """RA, with weights learned per head or fixed."""

    couples = True
    scales = {"window": "context"}

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """ATTN_RECIPROCAL_*."""

        alpha: float
        """w_r, at first or for good; w_s is 1."""
        learn: bool
        """Whether w_s and w_r are parameters."""
        window: int
        """Tokens that the reciprocal term reaches back; 0 is all."""

        def __post_init__(self) -> None:
            if not (self.alpha or self.learn):
                raise ValueError(
                    "CONFIG_ATTN_RECIPROCAL_ALPHA = 0 with CONFIG_ATTN_RECIPROCAL_LEARN = n : the reciprocal term would"
                    " never act; a fixed weight is not 0; set another one, or CONFIG_ATTN_RECIPROCAL_LEARN=y"
                )

    @property
    def identity(self) -> bool:
        return self.config.alpha == 0

    def size(self, dims: Dims) -> int:
        return 2 * dims.n_head * self.config.learn

    def widens(self, dims: Dims, length: int) -> int:
        reach = min(self.config.window + 1, length) if self.config.window else length
        return 2 * reach * dims.n_embd

    def parts(self, dims: Dims) -> tuple[Part, ...]:
        return (Fold(dims, self.config.alpha, self.config.learn, self.config.window),)

    def contracts(self) -> tuple[Clause, ...]:
        found = (*super().contracts(), Clause(f"width/{self.symbol}", "build", _widths))
        if self.config.learn:
            return found
        return (*found, Clause(f"fixed/{self.symbol}", "end", self._weights, 1e-6))

    def _weights(self, loop: Any) -> tuple[float, float]:
        mine = [m for m in loop.built.model.modules() if isinstance(m, Fold)]
        return self.config.alpha, torch.cat([m.w_r for m in mine]).mean().item()


def _widths(built: Any) -> tuple[list[int], list[int]]:
    """(twice the head dim, channels of the queries that attend gets), for each block."""
    model, found = built.model, []
    note = lambda part, args, h: found.append(h.pieces[0].q_BHTK.shape[-1])
    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, Fold)]
    training = model.training
    model.eval()  # no dropout: nothing is drawn
    with torch.no_grad():
        model(model.example().to(model.lam.device))
    model.train(training)
    for hook in hooks:
        hook.remove()
    return [2 * model.dims.head_dim] * model.dims.n_layer, found
