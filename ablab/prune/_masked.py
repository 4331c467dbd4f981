# SPDX-License-Identifier: MIT
"""Pruning by a score: masks that follow the ramp, and the zeros that they make."""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ablab.plugin import Clause, EffectError
from ablab.prune import Alloc, Prune, Pruner, Scope, Store
from ablab.prune._mask import Mask
from ablab.prune._schedule import Ramp
from ablab.prune._threshold import cut, kept, keys

MORE = 1e-4  # share of the weights that may be zero without a mask
CLOSE = 0.005  # sparsity may be off by half a percentage point


class Masked(Pruner):
    """Zeroes the lowest scores.  Monotone: what is zero is never ranked again.

    Scope FULL: an update zeroes weights and optimizer state, and between updates only gradients are masked: zero is
    a fixed point of every update rule that keeps zeros, so the bits are those of masking everything at every step.
    Scope WEIGHTS: gradients and state live, weights are masked after each step.
    """

    def __init__(self, network: nn.Module, optimizer: Any, section: Any, ramp: Ramp) -> None:
        super().__init__(network, section.tied)
        if not self.weights:
            raise ValueError("CONFIG_PRUNE_NONE is not set, but the model has no Linear or Conv2d to prune")
        self.optimizer, self.section, self.ramp = optimizer, section, ramp
        self.full = section.scope is Scope.FULL
        self.flat = optimizer.arena.weights
        spans = [optimizer.arena.span(p) for p in self.weights.values()]
        around = slice(min(s.start for s in spans), max(s.stop for s in spans))
        self.mask = Mask(around, section.mask is Store.BITS, self.flat.device)
        step = self.mask.chunks[0].stop - self.mask.chunks[0].start
        self.parts = [[slice(a, min(a + step, s.stop)) for a in range(s.start, s.stop, step)] for s in spans]
        """Chunks of each weight."""
        self.held = 0
        """Zeros that the last update made."""

    @abstractmethod
    def score(self, at: slice) -> Tensor:
        """fp32 scores of a stretch of the flat buffers; higher ones stay.  May be scratch."""

    def mask_gradients(self) -> None:
        if self.full and self.held:
            self.mask.apply(self.optimizer.arena.grads)

    @torch.no_grad()
    def update(self, step: int, progress: float) -> None:
        over = self.ramp.end is None and not self.ramping
        if self.ramp.due(step, progress) and not over:
            self.wanted = self.ramp.target(step, progress)
            for parts, k in self.allotted():
                self.prune(parts, k)
            self.mask.apply(self.flat, *(self.optimizer.flats.values() if self.full else ()))
            self.check(step)
        elif not self.full and self.held:
            self.mask.apply(self.flat)

    def allotted(self) -> Iterator[tuple[list[slice], int]]:
        """Which chunks are ranked together, and how many of their elements are to be zero."""
        if self.section.alloc is Alloc.GLOBAL:
            yield [c for parts in self.parts for c in parts], int(self.wanted * self.size)
        else:
            for parts in self.parts:
                yield parts, int(self.wanted * (parts[-1].stop - parts[0].start))

    def prune(self, parts: list[slice], k: int) -> None:
        """Mask the k lowest, dead ones first."""
        ranked = lambda c: keys(self.score(c), self.mask.words(c))
        where, seen = cut(lambda: map(ranked, parts), k), 0
        for c in parts:
            stay, seen = kept(ranked(c), where, seen)
            self.mask.put(c, stay)

    def masked(self) -> int:
        """Zeros in the mask, counted."""
        stay = [torch.count_nonzero(self.mask.words(c)) for parts in self.parts for c in parts]
        return self.size - int(torch.stack(stay).sum())

    def check(self, step: int) -> None:
        """The mask has as many zeros as it should, and the weights those and hardly more."""
        self.held = sum(k for _, k in self.allotted())
        masked, zeros = self.masked(), sum(self.zeros().values())
        if masked != self.held or not 0 <= zeros - masked <= MORE * self.size:
            raise EffectError(
                f"effect at step {step}: prune/zeros: expected {self.held} of {self.size}, measured {masked} in the"
                f" mask and {zeros} in the weights"
            )

    def gauges(self) -> dict[str, float]:
        zeros = self.zeros()
        found = {"sparsity": sum(zeros.values()) / self.size, "sparsity/target": self.wanted}
        found["sparsity/mask"] = self.masked() / self.size
        return found | {f"sparsity/{name}": n / self.weights[name].numel() for name, n in zeros.items()}

    def state(self) -> dict[str, Tensor]:
        return {"prune/mask": self.mask.packed(), "prune/wanted": torch.tensor(self.wanted, dtype=torch.float64)}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.mask.load(state["prune/mask"])
        self.wanted = float(state["prune/wanted"])
        self.held = self.masked()

    @property
    def ramping(self) -> bool:
        return self.wanted != self.ramp.final

    @property
    def nbytes(self) -> int:
        return self.mask.nbytes


def clauses(prune: Prune) -> tuple[Clause, ...]:
    """What holds of every method at each evaluation and at the end."""
    return (
        Clause("prune/sparsity", "eval", lambda loop: (loop.pruner.wanted, loop.pruner.sparsity()), CLOSE),
        Clause("prune/mask", "eval", lambda loop: (loop.pruner.held, loop.pruner.masked())),
        Clause("prune/final", "end", lambda loop: (prune.section.sparsity, loop.pruner.sparsity()), CLOSE),
    )
