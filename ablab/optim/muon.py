# SPDX-License-Identifier: MIT
"""Momentum, orthogonalised (Muon, Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).

For matrices, AdamW for the rest: b = mu b + (1 - mu) g;  u = (1 - mu) g + mu b (Nesterov) or b;
w *= 1 - lr lam;  w -= lr c NS(u), NS n Newton-Schulz iterations in bf16 towards the orthogonal factor of u, c by
ADJUST: sqrt(max(1, a / b)), or 0.2 sqrt(max(a, b)), the RMS of an AdamW update, so that both parts share OPT_LR.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import Tensor
from torch.optim._muon import muon  # the class imports dynamo, one second

from ablab.optim import Impl, Optim
from ablab.optim._matrix import FlatMatrix

NS = (3.4445, -4.7750, 2.0315)  # coefficients of the iteration, torch's default


class Adjust(Enum):
    """Factor on the rate of a matrix by its shape, as torch calls it."""

    ORIGINAL = "original"
    MATCH = "match_rms_adamw"


class FlatMuon(FlatMatrix):
    """torch's Muon."""

    def __init__(self, groups: list[dict[str, Any]], c: Any, rest: Any, impl: Impl) -> None:
        super().__init__(groups, rest, impl)
        self.zeros("momentum_buffer", slice(self.rest.stop, len(self.arena.weights)))
        self.kind = {"momentum": c.momentum, "nesterov": c.nesterov, "ns_steps": c.iters}
        self.kind |= {"adjust_lr_fn": c.adjust.value, "ns_coefficients": NS, "eps": 1e-7, "has_complex": False}

    def update(self, w: Tensor, g: Tensor, state: list[Tensor], lr: float, decay: float) -> None:
        muon([w], [g], state, lr=lr, weight_decay=decay, foreach=False, **self.kind)


class Muon(Optim, symbol="OPT_MUON"):
    """NOTE a pruned weight moves although its gradient is zero: only PRUNE_SCOPE_WEIGHTS keeps it at zero."""

    state_bytes, matrix_bytes = 8, 4

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """OPT_MUON_*."""

        momentum: float
        nesterov: bool
        iters: int
        """Newton-Schulz iterations n."""
        adjust: Adjust

    def parent(self) -> str:
        return "OPT_ADAMW"

    def build(self, groups: list[dict[str, Any]]) -> FlatMuon:
        return FlatMuon(groups, self.config, self.base.config, self.section.impl)
