# SPDX-License-Identifier: MIT
"""Gradient descent on balanced gradients, without state (SinkGD, Scetbon et al. 2025, https://arxiv.org/abs/2502.06742).

For matrices of a x b, AdamW for the rest: w *= 1 - lr lam;  w -= lr scale X, where X begins as g and
    PAPER  n times each row *= sqrt(b) / its L2 norm, then each column *= sqrt(a) / its L2 norm; X has RMS 1
    TANH   n times rows / their L1 norm, columns / their L1 norm, X = tanh(X / tau); then X gets the RMS of g
What is zero stays zero.  TANH is another algorithm that went by the same name, kept for comparison.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from ablab.optim import Impl, Optim
from ablab.optim._matrix import FlatMatrix


class Form(Enum):
    """How a gradient is balanced."""

    PAPER = "paper"
    TANH = "tanh"


def _divided(x: Tensor, dim: int, order: int) -> Tensor:
    """Rows (dim 1) or columns (dim 0) over their norms; those of zeros stay."""
    norm = torch.linalg.vector_norm(x, order, dim, keepdim=True)
    return x / torch.where(norm > 0, norm, 1)


def balanced(g: Tensor, form: Form, iters: int, tau: float | None) -> Tensor:
    """X of a gradient a x b."""
    a, b = g.shape
    x = g
    for _ in range(iters):
        if form is Form.PAPER:
            x = _divided(_divided(x, 1, 2) * b**0.5, 0, 2) * a**0.5
        else:
            x = torch.tanh(_divided(_divided(x, 1, 1), 0, 1) / tau)
    if form is Form.TANH:
        size = torch.linalg.vector_norm(x)
        x = x * (torch.linalg.vector_norm(g) / torch.where(size > 0, size, 1))
    return x


class FlatSinkgd(FlatMatrix):
    """Both forms."""

    def __init__(self, groups: list[dict[str, Any]], c: Any, rest: Any, impl: Impl) -> None:
        super().__init__(groups, rest, impl)
        self.c = c

    def update(self, w: Tensor, g: Tensor, state: list[Tensor], lr: float, decay: float) -> None:
        x = balanced(g, self.c.form, self.c.iters, self.c.tau)
        w.mul_(1 - lr * decay).sub_(x, alpha=lr * self.c.scale)


class Sinkgd(Optim, symbol="OPT_SINKGD"):
    """No state but that of the rest."""

    state_bytes, matrix_bytes = 8, 0

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """OPT_SINKGD_*."""

        form: Form
        iters: int
        """Rounds n."""
        tau: float | None
        scale: float
        """Factor on the rate of matrices."""

    def parent(self) -> str:
        return "OPT_ADAMW"

    def build(self, groups: list[dict[str, Any]]) -> FlatSinkgd:
        return FlatSinkgd(groups, self.config, self.base.config, self.section.impl)
