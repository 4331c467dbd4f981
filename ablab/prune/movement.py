# SPDX-License-Identifier: MIT
"""Movement pruning: what training moves to zero goes (Sanh et al. 2020, https://arxiv.org/abs/2005.07683).

score S -= g W at every step, W the weight under the mask: a pruned weight keeps its value in a shadow h, so that its
score goes on and it may return.  Masks are not monotone.  Bit-equal to masking in the forward pass.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ablab.plugin import Clause
from ablab.prune import Prune
from ablab.prune._masked import Masked, clauses


class ByMovement(Masked):
    """The parameter holds W mask, the shadow W (1 - mask)."""

    monotone = False

    def __init__(self, network: nn.Module, optimizer: Any, section: Any, ramp: Any, half: bool) -> None:
        super().__init__(network, optimizer, section, ramp)
        part = self.flat[self.mask.span]
        self.scores, self.shadow = (torch.zeros_like(part), part.new_zeros(len(part), dtype=self._kind(half)))

    def _kind(self, half: bool) -> torch.dtype:
        return torch.bfloat16 if half else self.flat.dtype

    def _own(self, at: slice) -> slice:
        """Where a stretch of the flat buffers lies in the two of this class."""
        first = self.mask.span.start
        return slice(at.start - first, at.stop - first)

    @torch.no_grad()
    def observe(self) -> None:
        for c in self.mask.chunks:
            own = self._own(c)
            self.scores[own].addcmul_(self.optimizer.arena.grads[c], self.flat[c] + self.shadow[own], value=-1)

    def score(self, at: slice) -> Tensor:
        return self.scores[self._own(at)].float()

    def zero(self) -> None:
        for c in self.mask.chunks:
            own, stay = self._own(c), self.mask.at(c).bool()
            whole = self.flat[c] + self.shadow[own]
            self.flat[c] = torch.where(stay, whole, 0)
            self.shadow[own] = torch.where(stay, 0, whole).to(self.shadow.dtype)
        super().zero()

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"prune/scores": self.scores.clone(), "prune/shadow": self.shadow.clone()}

    def restore(self, state: dict[str, Tensor]) -> None:
        super().restore(state)
        self.scores.copy_(state["prune/scores"])
        self.shadow.copy_(state["prune/shadow"])

    @property
    def nbytes(self) -> int:
        return self.mask.nbytes + self.scores.nbytes + self.shadow.nbytes


class Movement(Prune, symbol="PRUNE_MOVEMENT"):
    """First order: the direction counts, not the size."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """PRUNE_MOVEMENT_*."""

        shadow_bf16: bool
        """Shadow weights in two bytes; a weight that returns is rounded."""

    @property
    def score_bytes(self) -> int:
        return 6 if self.config.shadow_bf16 else 8

    def build(self, network: nn.Module, optimizer: Any, total: int | None, seed: int) -> Masked:
        return ByMovement(network, optimizer, self.section, self.ramp(total), self.config.shadow_bf16)

    def contracts(self) -> tuple[Clause, ...]:
        return clauses(self)
