# SPDX-License-Identifier: MIT
"""RA-CT: a statistic of each attention row drives a learned gate per head (after
https://github.com/mcgrof/AdamWPrune).

B batch, H heads, T tokens, V value dim.

With t the statistic, in [0, 1] at every position (`ablab/tensor/rowstat.py`), the gate is 1 + lam alpha tanh(u / 2),
u = a_h t + b_h.  Deviations: the statistic is normalised by position, and of the clean softmax; scaling rows of P
needs no P, since it is scaling what they mix.
Init: a, b 0, so the gate is 1.
"""

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn

from ablab.attention import Attention
from ablab.tensor import rowstat
from ablab.tensor.stage import Coupling, Ctx, Dims, Gate, Gauges, Heads, Mixed, Part, Rows


class Stat(Enum):
    """What is measured on a row."""

    TOPK = "topk"
    MAX = "max"
    ENTROPY = "entropy"
    RMS = "rms"


class Apply(Enum):
    """What the gate scales."""

    OUTPUT = "output"
    WEIGHTS = "weights"


class Statistic(Part):
    """The statistic and its gate."""

    reads = (Coupling,)
    wants_lse = True
    gauges = ("t_mean", "t_std", "gate_mean", "gate_std")

    def __init__(self, dims: Dims, config: "Ract.Config") -> None:
        super().__init__()
        self.config = config
        self.bound = 1.0 if config.alpha is None else config.alpha  # of the gate, around 1
        self.a_H = nn.Parameter(torch.zeros(dims.n_head))
        self.b_H = nn.Parameter(torch.zeros(dims.n_head))

    def statistic(self, m: Mixed, h: Heads, ctx: Ctx) -> Tensor:
        """t, BHT, or B1T if heads share it."""
        c = self.config
        with torch.set_grad_enabled(torch.is_grad_enabled() and not c.detach_stats):
            if c.stat is Stat.ENTROPY:
                t_BHT = rowstat.entropy_share(m, h, ctx)
            elif c.stat is Stat.RMS:
                t_BHT = rowstat.rms_share(m, h, ctx)
            else:
                t_BHT = rowstat.mass_share(m, h, ctx, c.k if c.stat is Stat.TOPK else 1)
        return t_BHT.mean(1, keepdim=True) if c.head_average else t_BHT

    def gate(self, m: Mixed, h: Heads, ctx: Ctx) -> Tensor:
        """BHT1."""
        t_BHT = self.statistic(m, h, ctx)
        u_BHT = self.a_H[:, None] * t_BHT + self.b_H[:, None]
        gate_BHT = 1 + ctx.one(Coupling).lam * (self.bound * torch.tanh(u_BHT / 2))
        for g in ctx.all(Gauges):
            values = {"t_mean": t_BHT.mean(), "t_std": t_BHT.std(correction=0)}
            g.put(ctx, self, **values, gate_mean=gate_BHT.mean(), gate_std=gate_BHT.std(correction=0))
        return gate_BHT[..., None]


class OutputGate(Statistic, Gate):
    """Scales what the head gives, y_BHTV, by 0 to 2."""

    def forward(self, m: Mixed, h: Heads, ctx: Ctx) -> tuple[Mixed, Ctx]:
        gate_BHT1 = self.gate(m, h, ctx)
        return m._replace(y_BHTV=(m.y_BHTV * gate_BHT1).to(m.y_BHTV.dtype)), ctx


class WeightsGate(Statistic, Rows):
    """Scales rows of P, that is all that they mix, by 1 - alpha to 1 + alpha."""

    def forward(self, m: Mixed, h: Heads, ctx: Ctx) -> Mixed:
        gate_BHT1 = self.gate(m, h, ctx)
        y_BHTV, *rest = ((t * gate_BHT1).to(t.dtype) for t in (m.y_BHTV, *m.side.values()))
        return m._replace(y_BHTV=y_BHTV, side=dict(zip(m.side, rest, strict=True)))


class Ract(Attention, symbol="ATTN_RACT"):
    """Gates from row statistics."""

    couples = True
    identity = True
    scales = {"k": "keys"}

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """ATTN_RACT_*."""

        stat: Stat
        k: int | None
        """Probabilities in the mass of STAT_TOPK."""
        head_average: bool
        """The statistic is the mean over heads of theirs."""
        apply: Apply
        alpha: float | None
        """Bound of the gate of APPLY_WEIGHTS."""
        detach_stats: bool
        """No gradient through the statistic."""

    def parts(self, dims: Dims) -> tuple[Part, ...]:
        kind = OutputGate if self.config.apply is Apply.OUTPUT else WeightsGate
        return (kind(dims, self.config),)

    def size(self, dims: Dims) -> int:
        return 2 * dims.n_head

    def flops(self, dims: Dims, length: int) -> int:
        """One Q K^T for an index pass, and as much for the values of a fused one; detached, forward only."""
        one = 2 * length * dims.n_embd + dims.dearer
        passes = 1 if self.config.stat in (Stat.TOPK, Stat.MAX) else 2
        return passes * one // (3 if self.config.detach_stats else 1)
