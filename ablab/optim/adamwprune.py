# SPDX-License-Identifier: MIT
"""An optimizer of Adam's family that brings its own pruner: the base and PRUNE_STATE, which scores by its state.

Composition and nothing else: there is no update rule here, and no beta, decay or AMSGrad is overridden, so that with
PRUNE_NONE a trial is that of the base.  The name is that of the public AdamWPrune, whose bundle this takes apart.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any

from ablab.optim import Optim
from ablab.optim._flat import FlatOptimizer


class Base(Enum):
    """The optimizer that does the work."""

    ADAM = "OPT_ADAM"
    ADAMW = "OPT_ADAMW"
    ADAMWADV = "OPT_ADAMWADV"
    ADAMWSPAM = "OPT_ADAMWSPAM"


class Adamwprune(Optim, symbol="OPT_ADAMWPRUNE"):
    """One spelling for each pair of optimizer and state pruner."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """OPT_ADAMWPRUNE_*."""

        base: Base

    def parent(self) -> str:
        return self.config.base.value

    @property
    def state_bytes(self) -> int:
        return self.base.state_bytes

    def build(self, groups: list[dict[str, Any]]) -> FlatOptimizer:
        assert self.base.symbol == self.config.base.value, "built on another base than asked for"
        return self.base.build(groups)
