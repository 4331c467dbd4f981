# SPDX-License-Identifier: MIT
"""Magnitude pruning: small weights go (Han et al. 2015, https://arxiv.org/abs/1506.02626).

score = |w|, over a ramp (Zhu and Gupta 2017, https://arxiv.org/abs/1710.01878).
"""

from typing import Any

from torch import Tensor, nn

from ablab.plugin import Clause
from ablab.prune import Prune
from ablab.prune._masked import Masked, clauses


class ByMagnitude(Masked):
    """score = |w|."""

    absolute = True

    def score(self, at: slice) -> Tensor:
        return self.flat[at].float().abs()


class Magnitude(Prune, symbol="PRUNE_MAGNITUDE"):
    """The reference among pruning methods."""

    def build(self, network: nn.Module, optimizer: Any, total: int | None, seed: int) -> Masked:
        return ByMagnitude(network, optimizer, self.section, self.ramp(total))

    def contracts(self) -> tuple[Clause, ...]:
        return clauses(self)
