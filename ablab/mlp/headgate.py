# SPDX-License-Identifier: MIT
"""The hidden layer of a block gates the attention heads of the next, token by token.

    u = Wh GELU(Wg h) + b,  o[t, h] <- o[t, h] (1 + lam ALPHA tanh(u / 2))

B batch, T tokens, H heads, V value dim, F hidden, G gate width.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablab.mlp import Mlp
from ablab.tensor.stage import Coupling, Ctx, Dims, Emit, Gate, Gauges, Heads, Mixed, Part


class HeadScale(NamedTuple):
    """Carried to the next block: the factor on each head, fp32 or better."""

    s_BTH: Tensor


class EmitScale(Emit):
    """NOTE without the GELU, Wh Wg were one map of rank H at most, and G bought nothing."""

    reads = (Coupling,)
    emits = (HeadScale,)
    gauges = ("scale_mean", "scale_std", "bound_frac")
    std = {"gate_in": 0.02}

    def __init__(self, dims: Dims, width: int, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha
        self.gate_in = nn.Parameter(torch.empty(width, dims.mlp_hidden))
        self.gate_out = nn.Parameter(torch.zeros(dims.n_head, width))
        self.b = nn.Parameter(torch.zeros(dims.n_head))

    def forward(self, h_BTF: Tensor, ctx: Ctx) -> HeadScale:
        u_BTH = F.linear(F.gelu(F.linear(h_BTF, self.gate_in)), self.gate_out, self.b)
        t_BTH = torch.tanh(u_BTH.to(torch.promote_types(u_BTH.dtype, torch.float32)) / 2)
        s_BTH = 1 + ctx.one(Coupling).lam * self.alpha * t_BTH
        for g in ctx.all(Gauges):
            bound = (t_BTH.abs() > 0.99).to(t_BTH.dtype).mean()  # within 1 % of 1 - ALPHA or 1 + ALPHA, at lam = 1
            g.put(ctx, self, scale_mean=s_BTH.mean(), scale_std=s_BTH.std(correction=0), bound_frac=bound)
        return HeadScale(s_BTH)


class ApplyScale(Gate):
    """Each token scales its own row only."""

    reads = (HeadScale,)

    def forward(self, m: Mixed, h: Heads, ctx: Ctx) -> tuple[Mixed, Ctx]:
        s_BHT1 = ctx.one(HeadScale).s_BTH.transpose(1, 2)[..., None]
        return m._replace(y_BHTV=(m.y_BHTV * s_BHT1).to(m.y_BHTV.dtype)), ctx


class Headgate(Mlp, symbol="MLP_HEADGATE"):
    """Head gate for the next block."""

    couples = identity = True
    scales = {"dim": "width"}

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """MLP_HEADGATE_*."""

        dim: int
        """Units G between the hidden layer and the gates."""
        alpha: float
        """The gate stays inside 1 - alpha and 1 + alpha."""

    def size(self, dims: Dims) -> int:
        return 0 if dims.last else self.config.dim * (dims.mlp_hidden + dims.n_head) + dims.n_head

    def parts(self, dims: Dims) -> tuple[Part, ...]:
        c = self.config
        return (*([] if dims.first else [ApplyScale()]), *([] if dims.last else [EmitScale(dims, c.dim, c.alpha)]))
