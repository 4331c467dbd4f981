# SPDX-License-Identifier: MIT
"""Reciprocal MLP: what attention adds to the residual also feeds the last units of the hidden layer of its block.

    pre[-R:] += lam Wa y

B batch, T tokens, D model, F hidden, R units that are fed.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablab.mlp import Mlp
from ablab.tensor.stage import Attended, Coupling, Ctx, Dims, Gauges, Part, Pre, share


class Feed(Pre):
    """The other units are the host's."""

    reads = (Coupling, Attended)
    gauges = ("term_rms",)

    def __init__(self, dims: Dims, width: int) -> None:
        super().__init__()
        self.recip_w = nn.Parameter(torch.zeros(width, dims.n_embd))

    def forward(self, pre_BTF: Tensor, ctx: Ctx) -> Tensor:
        width = self.recip_w.shape[0]
        term_BTR = ctx.one(Coupling).lam * F.linear(ctx.one(Attended).y_BTD, self.recip_w)
        rest, fed_BTR = pre_BTF.split([pre_BTF.shape[-1] - width, width], -1)
        for g in ctx.all(Gauges):
            g.put(ctx, self, term_rms=share(term_BTR, fed_BTR))
        return torch.cat([rest, fed_BTR + term_BTR], -1)


class Reciprocal(Mlp, symbol="MLP_RECIPROCAL"):
    """Attention output into the hidden layer."""

    couples = identity = True
    scales = {"width": "width"}

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """MLP_RECIPROCAL_*."""

        width: int
        """Units R, the last of the hidden layer."""

    def size(self, dims: Dims) -> int:
        return self.config.width * dims.n_embd

    def parts(self, dims: Dims) -> tuple[Part, ...]:
        width = self.config.width
        if width > dims.mlp_hidden:
            raise ValueError(
                f"CONFIG_MLP_RECIPROCAL_WIDTH = {width} exceeds CONFIG_MLP_GELU_WIDTH = {dims.mlp_hidden} :"
                f" it feeds units that exist; set {dims.mlp_hidden} or less"
            )
        return (Feed(dims, width),)
