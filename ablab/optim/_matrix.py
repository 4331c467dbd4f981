# SPDX-License-Identifier: MIT
"""Optimizers with a rule for matrices: the last group, `matrix`; AdamW with OPT_ADAMW_* for the rest."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ablab.optim import Impl, is_matrix
from ablab.optim._flat import FlatOptimizer
from ablab.optim.adamw import FlatAdamW, Settings


class FlatMatrix(FlatAdamW):
    """Base of them.  A Conv2d weight is a matrix of output channels x the rest."""

    def __init__(self, groups: list[dict[str, Any]], rest: Settings, impl: Impl) -> None:
        super().__init__(groups, rest.beta1, rest.beta2, rest.eps, impl)
        self.matrices = [(g, p) for g in self.param_groups if is_matrix(g["name"]) for p in g["params"]]

    mask = FlatOptimizer.mask  # before matrices are read

    @abstractmethod
    def update(self, w: Tensor, g: Tensor, state: list[Tensor], lr: float, decay: float) -> None:
        """Update a matrix and its state in place."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        for group, p in self.matrices:
            w, g = p.detach(), p.grad
            state = [t for name, t in self.state[p].items() if name in self.flats]
            g = g if self.grad_scale is None else g / self.grad_scale
            flat = [t.flatten(1) for t in state]
            with self.gated(group, [w], state):
                self.update(w.flatten(1), g.flatten(1), flat, group["lr"], group["weight_decay"])
        super().step()
