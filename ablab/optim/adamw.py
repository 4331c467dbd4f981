# SPDX-License-Identifier: MIT
"""AdamW: Adam with decoupled weight decay (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101).

w *= 1 - lr lam;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;
w -= lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from ablab.optim import Impl, Optim, is_matrix
from ablab.optim._flat import FlatOptimizer
from ablab.tensor import native


class FlatAdamW(FlatOptimizer):
    """torch's AdamW on flat buffers: two kernels a step, one for each group.  The compiled one also takes the mask.

    NOTE bit-equal to torch's over separate tensors, apart from their last elements where a size is no multiple of
    the vector length: torch's fused CPU kernel rounds those otherwise, and in a flat buffer they are not last.
    """

    fused = staticmethod(torch._fused_adamw_)
    decoupled = True

    def __init__(
        self, groups: list[dict[str, Any]], beta1: float, beta2: float, eps: float, impl: Impl, amsgrad: bool = False
    ) -> None:
        super().__init__(groups)
        self.impl = impl
        self.rule = {"beta1": beta1, "beta2": beta2, "eps": eps, "amsgrad": amsgrad, "maximize": False}
        names = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if amsgrad else ()))
        spans = [s for s, g in zip(self.arena.spans, groups, strict=True) if not is_matrix(g["name"])]  # the first
        self.rest = slice(0, max((s.stop for s in spans), default=0))
        flats = (self.arena.weights, self.arena.grads, *(self.zeros(name, self.rest) for name in names))
        self.buffers = [[[flat[span]] for flat in flats] for span in spans]

    @property
    def compiled(self) -> native.Native | None:
        serves = self.impl is Impl.FUSED and self.rule["beta1"] > 0.5  # below that torch has another form
        return native.on(self.arena.weights) if serves else None

    def mask(self, mask: Any) -> None:
        if self.compiled:
            self.pending = mask.keep
        else:
            super().mask(mask)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Apply the gradients, divided by `grad_scale`, to groups whose `found_inf` is not 1; their `lr` are floats."""
        self.tick()
        self.apply(
            [{"lr": group["lr"], "weight_decay": group["weight_decay"]} for group in self.param_groups], self.rule
        )

    def apply(self, rates: list[dict[str, float]], rule: dict[str, Any]) -> None:
        """One update after `tick`, with the rates of each group and the constants of all."""
        scale, lib = self.divisor(self.impl is Impl.FUSED), self.compiled
        for group, rate, (w, g, m, v, *x) in zip(self.param_groups, rates, self.buffers, strict=False):  # no matrices
            args = (w, g, m, v, *(x or ([],)))
            if lib:
                at, scalars = w[0].storage_offset(), (scale, group["found_inf"], group["count"])
                lib.adam([t for (t,) in (w, g, m, v, *x)], at, self.pending, scalars, rate, rule, not self.decoupled)
            elif self.impl is Impl.FUSED:
                gate = {"grad_scale": scale, "found_inf": group["found_inf"]}
                self.fused(*args, [group["count"]], **rate, **rule, **gate)
            else:
                with self.gated(group, w, m, v, *x):
                    self._plain(args, group["count"], rate, rule)

    def _plain(
        self, args: tuple[list[Tensor], ...], count: Tensor, rate: dict[str, float], rule: dict[str, Any]
    ) -> None:
        """The two references."""
        gpu = count.is_cuda  # there torch reads the count on the host at every step, unless told `capturable`
        # that form divides by the rate: 0 / 0 where m and v are 0
        rest = rate | {"lr": rate["lr"] or (1e-30 if gpu else 0.0), "decoupled_weight_decay": self.decoupled}
        kind = {"foreach": self.impl is Impl.FOREACH, "capturable": gpu}
        adam(*args, [(count - 1).clamp_(min=0)], **kind, **rest, **rule)  # torch counts it up


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """BETA1, BETA2 and EPS of a member of Adam's family."""

    beta1: float
    """Memory of the first moment."""
    beta2: float
    """Memory of the second moment."""
    eps: float
    """Added to the root of the second moment."""


class Adamw(Optim, symbol="OPT_ADAMW"):
    """The default."""

    state_bytes = 8
    Config = Settings

    def build(self, groups: list[dict[str, Any]]) -> FlatAdamW:
        c = self.config
        return FlatAdamW(groups, c.beta1, c.beta2, c.eps, self.section.impl)
