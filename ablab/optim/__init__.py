# SPDX-License-Identifier: MIT
"""Optimizers: the update rule of a trial and the policy that belongs to it."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ablab.optim._flat import FlatOptimizer
from ablab.plugin import Clause, Plugin

MATRIX = "matrix"
"""Name of the last parameter group: weights of Linear and Conv2d where they have a rule of their own."""


def is_matrix(group: str) -> bool:
    """True for the name of such a group, coupled or not."""
    return group.endswith(MATRIX)


class Impl(Enum):
    """How torch runs the update."""

    FUSED = "fused"
    FOREACH = "foreach"
    LOOP = "loop"


class Optim(Plugin, family="OPT"):
    """Base of the optimizers."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Section:
        """OPT_* symbols that every optimizer shares."""

        lr: float
        """Peak learning rate."""
        weight_decay: float
        """Decay of the matrices that are not embeddings."""
        decay_embed: bool
        clip_norm: float
        """Global L2 norm above which gradients are scaled down; 0 is off."""
        impl: Impl

    state_bytes: int
    """Claimed bytes of state per parameter, fp32."""
    matrix_bytes: int | None = None
    """The same for the group `matrix`; None: there is none."""

    @abstractmethod
    def build(self, groups: list[dict[str, Any]]) -> FlatOptimizer:
        """Called once by build.py.  `groups` are torch parameter groups with `params`, `name` (`decay`, `plain`,
        `matrix`) and `weight_decay` set; returns the optimizer over exactly those.  Groups `coupled_..` also have
        `lam`, a 0-d tensor: while it is 0 they rest, as `FlatOptimizer` in `_flat.py` says."""

    def claimed(self, groups: Mapping[str, int]) -> int:
        """Bytes of state for groups of these sizes."""
        return sum(n * (self.matrix_bytes if is_matrix(name) else self.state_bytes) for name, n in groups.items())

    def contracts(self) -> tuple[Clause, ...]:
        def measured(built: Any) -> tuple[int, int]:
            flats, states = built.optimizer.flats, built.optimizer.state.values()
            return self.claimed(built.groups), sum(s[k].nbytes for s in states for k in flats if k in s)

        return (Clause("optim/state_bytes", "build", measured),)
