# SPDX-License-Identifier: MIT
"""Stochastic gradient descent with momentum (Polyak 1964; Nesterov's form by Sutskever et al. 2013).

g += lam w;  b = mu b + g;  w -= lr b, or with Nesterov's form w -= lr (g + mu b).  No dampening.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.sgd import sgd

from ablab.optim import Impl, Optim
from ablab.optim._flat import FlatOptimizer


class FlatSgd(FlatOptimizer):
    """torch's SGD on flat buffers; the first step finds b = 0, which gives what torch starts with."""

    def __init__(self, groups: list[dict[str, Any]], momentum: float, nesterov: bool, impl: Impl) -> None:
        super().__init__(groups)
        self.impl = impl
        self.rule = {"momentum": momentum, "nesterov": nesterov, "dampening": 0.0, "maximize": False}
        flats = (self.arena.weights, self.arena.grads, *([self.zeros("momentum_buffer")] if momentum else []))
        self.buffers = [[[flat[span]] for flat in flats] for span in self.arena.spans]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Apply the gradients, divided by `grad_scale`, to groups whose `found_inf` is not 1."""
        self.tick()
        scale = self.divisor(self.impl is Impl.FUSED)
        for group, (w, g, *b) in zip(self.param_groups, self.buffers, strict=True):
            rule = self.rule | {"lr": group["lr"], "weight_decay": group["weight_decay"]}
            if self.impl is Impl.FUSED:
                gate = {"grad_scale": scale, "found_inf": group["found_inf"]}
                torch._fused_sgd_(w, g, *(b or ([],)), **rule, **gate, is_first_step=False)
            else:
                with self.gated(group, w, *b):
                    sgd(w, g, *(b or ([None],)), **rule, foreach=self.impl is Impl.FOREACH)


class Sgd(Optim, symbol="OPT_SGD"):
    """What image models are trained with."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """OPT_SGD_*."""

        momentum: float
        nesterov: bool

        def __post_init__(self) -> None:
            if self.nesterov and not self.momentum:
                raise ValueError(
                    f"CONFIG_OPT_SGD_NESTEROV = y : needs momentum, but CONFIG_OPT_SGD_MOMENTUM = {self.momentum}"
                )

    @property
    def state_bytes(self) -> int:
        return 4 if self.config.momentum else 0

    def build(self, groups: list[dict[str, Any]]) -> FlatSgd:
        return FlatSgd(groups, self.config.momentum, self.config.nesterov, self.section.impl)
