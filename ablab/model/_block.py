# SPDX-License-Identifier: MIT
"""The hosts of a block, attention and MLP: loops over stages that name no mechanism.

B batch, T tokens, D model, F hidden.
"""

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ablab.tensor.attend import attend
from ablab.tensor.stage import ATTENTION_STAGES, MLP_STAGES, SINGLE, Attended, Ctx, Dims, Gauges, Linear, Part

Parts = Sequence[Part]
"""Those of one block: of attention members first, then MLP, each in Kconfig order."""


def by_slug(parts: Parts, stage: str) -> Mapping[str, Part]:
    """Parts of a stage under their member's name; an empty stage is no module, so it is not in the tree."""
    found = {p.symbol.partition("_")[2].lower(): p for p in parts if p.stage == stage}
    return nn.ModuleDict(found) if found else {}


class Host(nn.Module):
    """Holds the parts of its stages: single ones under the stage's name, others in order by slug."""

    def __init__(self, parts: Parts, stages: Sequence[type[Part]], dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        for stage in (s.stage for s in stages):
            chosen = by_slug(parts, stage)
            setattr(self, stage, *chosen.values()) if stage in SINGLE else setattr(self, stage, chosen)

    def drop(self, y_BTD: Tensor) -> Tensor:
        return F.dropout(y_BTD, self.dropout, self.training) if self.dropout else y_BTD


class AttentionHost(Host):
    """x_BTD to what attention adds to the residual."""

    def __init__(self, parts: Parts, dims: Dims) -> None:
        super().__init__(parts, ATTENTION_STAGES, dims.dropout)
        self.wants_lse = any(p.wants_lse for p in parts)
        self.publish = any(Attended in p.reads + p.takes for p in parts)
        self.out = Linear(dims.n_embd, dims.n_embd, dims.bias, dims.residual_std)

    def forward(self, x_BTD: Tensor, ctx: Ctx) -> tuple[Tensor, Ctx]:
        h, ctx = self.project(x_BTD, ctx)
        for part in self.score.values():
            h = part(h, ctx)
        for g in ctx.all(Gauges):
            g.watch(h, ctx)
        m, ctx = attend(h, ctx, self.wants_lse)
        for part in self.rows.values():
            m = part(m, h, ctx)
        for part in self.gate.values():
            m, ctx = part(m, h, ctx)
        B, T, D = x_BTD.shape
        y_BTD = self.drop(self.out(m.y_BHTV.transpose(1, 2).reshape(B * T, D)).view(B, T, D))
        return y_BTD, ctx.put(Attended(y_BTD)) if self.publish else ctx


class MlpHost(Host):
    """x_BTD to what the MLP adds to the residual, and the context of the next block."""

    def __init__(self, parts: Parts, dims: Dims) -> None:
        super().__init__(parts, MLP_STAGES, dims.dropout)

    def forward(self, x_BTD: Tensor, ctx: Ctx) -> tuple[Tensor, Ctx]:
        pre_BTF = self.up(x_BTD, ctx)
        for part in self.pre.values():
            pre_BTF = part(pre_BTF, ctx)
        h_BTF = self.act(pre_BTF)
        for part in self.enrich.values():
            h_BTF = part(h_BTF, ctx)
        ctx = ctx.next(*[part(h_BTF, ctx) for part in self.emit.values()])
        return self.drop(self.down(h_BTF)), ctx


class Block(nn.Module):
    """Pre-norm transformer block; a context that it returns is the next block's."""

    def __init__(self, parts: Parts, dims: Dims) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(dims.n_embd, bias=dims.bias)
        self.attn = AttentionHost(parts, dims)
        self.ln2 = nn.LayerNorm(dims.n_embd, bias=dims.bias)
        self.mlp = MlpHost(parts, dims)

    def forward(self, x_BTD: Tensor, ctx: Ctx) -> tuple[Tensor, Ctx]:
        y_BTD, ctx = self.attn(self.ln1(x_BTD), ctx)
        x_BTD = x_BTD + y_BTD
        y_BTD, ctx = self.mlp(self.ln2(x_BTD), ctx)
        return x_BTD + y_BTD, ctx
