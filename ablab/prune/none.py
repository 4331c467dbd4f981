# SPDX-License-Identifier: MIT
"""No pruning: a member like any other, so the loop holds no branch and a dense trial holds no mask."""

from typing import Any

from torch import nn

from ablab.plugin import Clause
from ablab.prune import Prune, Pruner


class None_(Prune, symbol="PRUNE_NONE"):  # noqa: N801  NOTE `None` cannot name a class
    """Strictly dense."""

    def build(self, network: nn.Module, optimizer: Any, total: int | None, seed: int) -> Pruner:
        return Pruner(network)

    def contracts(self) -> tuple[Clause, ...]:
        return (
            Clause("prune/dense", "end", lambda loop: (0.0, loop.pruner.sparsity()), 1e-4),
            Clause("prune/mask_bytes", "end", lambda loop: (0, loop.pruner.nbytes)),
        )
