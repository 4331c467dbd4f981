# SPDX-License-Identifier: MIT
"""Displacement pruning: what training has brought towards zero, or through it, goes.

score = w (w - w0), w0 the initial weight.  Related to movement pruning, but of the path's ends alone: another
criterion, so another name; masks are monotone.
"""

from typing import Any

from torch import Tensor, nn

from ablab.plugin import Clause
from ablab.prune import Prune
from ablab.prune._masked import Masked, clauses


class ByDisplacement(Masked):
    """Holds the weights that it was built with."""

    def __init__(self, network: nn.Module, optimizer: Any, section: Any, ramp: Any) -> None:
        super().__init__(network, optimizer, section, ramp)
        self.first = self.flat[self.mask.span].clone()

    def score(self, at: slice) -> Tensor:
        w, start = self.flat[at].float(), self.mask.span.start
        return w * (w - self.first[at.start - start : at.stop - start].float())

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"prune/first": self.first.clone()}

    def restore(self, state: dict[str, Tensor]) -> None:
        super().restore(state)
        self.first.copy_(state["prune/first"])

    @property
    def nbytes(self) -> int:
        return self.mask.nbytes + self.first.nbytes


class Displacement(Prune, symbol="PRUNE_DISPLACEMENT"):
    """Of the whole way from the initial weights."""

    score_bytes = 4

    def build(self, network: nn.Module, optimizer: Any, total: int | None, seed: int) -> Masked:
        return ByDisplacement(network, optimizer, self.section, self.ramp(total))

    def contracts(self) -> tuple[Clause, ...]:
        return clauses(self)
