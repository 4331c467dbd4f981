# SPDX-License-Identifier: MIT
"""AdamW: Adam with decoupled weight decay (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101).

w *= 1 - lr lam;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;
w -= lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.adamw import adamw

from ablab.optim import Impl, Optim
from ablab.optim._flat import FlatOptimizer
from ablab.plugin import Clause


class FlatAdamW(FlatOptimizer):
    """torch's AdamW on flat buffers: two kernels a step, one for each group.

    NOTE bit-equal to torch's over separate tensors, apart from their last elements where a size is no multiple of
    the vector length: torch's fused CPU kernel rounds those otherwise, and in a flat buffer they are not last.
    """

    def __init__(self, groups: list[dict[str, Any]], beta1: float, beta2: float, eps: float, impl: Impl) -> None:
        super().__init__(groups)
        self.impl = impl
        self.rule = {"beta1": beta1, "beta2": beta2, "eps": eps, "amsgrad": False, "maximize": False}
        flats = (self.arena.weights, self.arena.grads, self.zeros("exp_avg"), self.zeros("exp_avg_sq"))
        self.buffers = [[[flat[span]] for flat in flats] for span in self.arena.spans]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Apply the gradients, divided by `grad_scale`, unless `found_inf` is 1; each group's `lr` is a float."""
        self.tick()
        if self.impl is not Impl.FUSED:
            return self._plain_step()
        for group, (w, g, m, v) in zip(self.param_groups, self.buffers, strict=True):
            args = (w, g, m, v, [], [group["count"]])
            rest = {"lr": group["lr"], "weight_decay": group["weight_decay"], **self.rule}
            torch._fused_adamw_(*args, **rest, grad_scale=self.grad_scale, found_inf=group["found_inf"])

    def _plain_step(self) -> None:
        """The two references: torch gives them neither scale nor gate, so a refused step is taken back."""
        if self.grad_scale is not None:
            self.arena.grads.div_(self.grad_scale)
        for group, (w, g, m, v) in zip(self.param_groups, self.buffers, strict=True):
            changed = [*w, *m, *v]
            before = [t.clone() for t in changed]
            count = (group["count"] - 1).clamp_(min=0)  # torch counts it up
            gpu = count.is_cuda  # there torch reads the count on the host at every step, unless told `capturable`
            rate = group["lr"] or (1e-30 if gpu else 0.0)  # that form divides by the rate: 0 / 0 where m and v are 0
            rest = {"lr": rate, "weight_decay": group["weight_decay"], **self.rule}
            kind = {"foreach": self.impl is Impl.FOREACH, "capturable": gpu}
            adamw(w, g, m, v, [], [count], **kind, **rest)
            if group["found_inf"] is not None:
                for tensor, old in zip(changed, before, strict=True):
                    tensor.copy_(torch.where(group["found_inf"].bool(), old, tensor))


class Adamw(Optim, symbol="OPT_ADAMW"):
    """The default."""

    state_bytes = 8
    """Claimed bytes of state per parameter: m and v in fp32."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """OPT_ADAMW_*."""

        beta1: float
        """Memory of the first moment."""
        beta2: float
        """Memory of the second moment."""
        eps: float
        """Added to the root of the second moment."""

    def build(self, groups: list[dict[str, Any]]) -> FlatAdamW:
        c = self.config
        return FlatAdamW(groups, c.beta1, c.beta2, c.eps, self.section.impl)

    def contracts(self) -> tuple[Clause, ...]:
        def measured(built: Any) -> tuple[int, int]:
            state = [t for s in built.optimizer.state.values() for k, t in s.items() if k != "step"]
            return self.state_bytes * built.trainable, sum(t.nbytes for t in state)

        return (Clause("optim/state_bytes", "build", measured),)
