# SPDX-License-Identifier: MIT
"""Pruning by a score: masks that follow the ramp, and the zeros that they make."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ablab.plugin import Clause, EffectError
from ablab.prune import Alloc, Pattern, Prune, Pruner, Scope, Store
from ablab.prune._mask import Mask
from ablab.prune._schedule import Ramp, by_depth
from ablab.prune._threshold import Cut, around, cut, kept, keys, plain
from ablab.tensor import native
from ablab.tensor.native import Ranked

MORE = 1e-4  # share of the weights that may be zero without a mask
CLOSE = 0.005  # sparsity may be off by half a percentage point
GROUP = 4  # of which a pattern keeps two
FEW, ALIGN = 128, 64  # one element in so many guesses the cut; in whole groups and whole bytes of bits


class Masked(Pruner):
    """Zeroes the lowest scores.

    Scope FULL: an update zeroes weights and optimizer state, and between updates only gradients are masked: zero is
    a fixed point of every update rule that keeps zeros, so the bits are those of masking everything at every step.
    Scope WEIGHTS: gradients and state live, weights are masked after each step.
    """

    monotone = True
    """What is zero is never ranked again."""
    absolute = False
    """The score is the magnitude of the weight."""

    def __init__(self, network: nn.Module, optimizer: Any, section: Any, ramp: Ramp) -> None:
        super().__init__(network, section)
        if section.pattern is Pattern["2OF4"]:
            odd = [n for n, p in self.weights.items() if p[0].numel() % GROUP]
            self.weights = {n: p for n, p in self.weights.items() if n not in odd}
            for name in odd:
                print(f"not pruned, for its rows are no multiple of {GROUP}: {name}")
        self.size = sum(p.numel() for p in self.weights.values())
        if not self.weights:
            raise ValueError("CONFIG_PRUNE_NONE is not set, but the model has no Linear or Conv2d that can be pruned")
        self.optimizer, self.section, self.ramp = optimizer, section, ramp
        self.full = section.scope is Scope.FULL
        self.flat = optimizer.arena.weights
        spans = [optimizer.arena.span(p) for p in self.weights.values()]
        around = slice(min(s.start for s in spans), max(s.stop for s in spans))
        self.mask = Mask(around, section.mask is Store.BITS, self.flat.device)
        step = self.mask.chunks[0].stop - self.mask.chunks[0].start
        self.parts = [[slice(a, min(a + step, s.stop)) for a in range(s.start, s.stop, step)] for s in spans]
        """Chunks of each weight."""

    @abstractmethod
    def score(self, at: slice) -> Tensor:
        """fp32 scores of a stretch of the flat buffers; higher ones stay."""

    def prepare(self) -> None:
        """Called before the scores of an update are asked for."""

    def mask_gradients(self) -> None:
        if self.full and self.held:
            self.optimizer.mask(self.mask)

    @torch.no_grad()
    def update(self, step: int, progress: float) -> None:
        over = self.ramp.end is None and not self.ramping
        if self.ramp.due(step, progress) and not over:
            if float(self.optimizer.found_inf):
                return  # a refused step: the trial ends as diverged
            self.prepare()
            self.wanted = self.ramp.target(step, progress)
            for parts, k in self.allotted():
                self.prune(parts, k)
            self.held = sum(k for _, k in self.allotted())
            self.zero()
            self.check(step)
        elif not self.full and self.held:
            self.mask.apply(self.flat)

    def allotted(self) -> Iterator[tuple[list[slice], int]]:
        """Which chunks are ranked together, and how many of their elements are to be zero."""
        s, sizes = self.section, [parts[-1].stop - parts[0].start for parts in self.parts]
        if s.alloc is Alloc.GLOBAL:
            yield [c for parts in self.parts for c in parts], self._zeros(self.size, self.wanted)
            return
        even = [self.wanted] * len(sizes)
        shares = even if s.alloc is Alloc.LAYER else by_depth(sizes, self.wanted, s.alloc_cap)
        for parts, size, share in zip(self.parts, sizes, shares, strict=True):
            yield parts, self._zeros(size, share)

    def _zeros(self, size: int, share: float) -> int:
        if self.section.pattern is Pattern.FREE:
            return int(share * size)
        return 2 * int(2 * share * (size // GROUP))

    def prune(self, parts: list[slice], k: int) -> None:
        """Mask the k lowest of some chunks, dead ones first."""
        free = self.section.pattern is Pattern.FREE
        ranked = self._ranked if free else self._groups
        where, seen = self.cut(ranked, parts, k if free else k // 2), 0
        for c in parts:
            found = ranked(c)
            if isinstance(found, Ranked):
                seen += native.InForce.lib.put(found, where.key, where.ties - seen, self.mask.keep)
                continue
            stay, seen = kept(found, where, seen)
            self.mask.put(c, stay if free else self._best(c, stay))

    def cut(self, ranked: Callable[[slice], Tensor | Ranked], parts: list[slice], k: int) -> Cut:
        """Where to cut chunks, sought first where the beginnings of all have it."""
        sizes = [c.stop - c.start for c in parts]
        few = [min(n, -(-n // FEW // ALIGN) * ALIGN) for n in sizes]
        begins = [ranked(slice(c.start, c.start + n)) for c, n in zip(parts, few, strict=True)]
        some = torch.cat([plain(c) for c in begins])
        ranks = len(some) / sum(few) * sum(sizes)  # groups have fewer keys than elements
        return cut(lambda: map(ranked, parts), k, around(some, k / ranks))

    def _ranked(self, c: slice, score: Callable[[slice], Tensor] | None = None) -> Tensor | Ranked:
        """What ranks a chunk, by default by its score."""
        absolute = self.absolute and not score
        found = self.flat[c].float() if absolute else (score or self.score)(c)
        if native.on(found):
            return Ranked(found, c.start, self.mask.keep if self.monotone else None, absolute)
        return keys(found, self.mask.words(c) if self.monotone else None, absolute)

    def _groups(self, c: slice) -> Tensor:
        """Keys of what each group would lose; of a group that lost it they are lowest."""
        lost = self.score(c).view(-1, GROUP).sort().values[:, :2].sum(1)
        return keys(lost, self.mask.words(c).view(-1, GROUP).amax(1) if self.monotone else None)

    def _best(self, c: slice, stay: Tensor) -> Tensor:
        """Two of a group that does not stay whole."""
        order = plain(self._ranked(c)).view(-1, GROUP).sort(dim=1, stable=True).indices
        return torch.ones_like(order, dtype=torch.bool).scatter_(1, order[:, :2], stay[:, None].expand(-1, 2)).view(-1)

    def at_rank(self, k: int, value: Callable[[slice], Tensor]) -> float:
        """The k-th smallest of a quantity >= 0 over the live weights."""
        parts = [c for parts in self.parts for c in parts]
        where = self.cut(lambda c: self._ranked(c, value), parts, self.held + k)
        return torch.tensor(where.key, dtype=torch.int32).view(torch.float32).item()

    def zero(self) -> None:
        """Make the mask felt."""
        self.mask.apply(self.flat, *(self.optimizer.flats.values() if self.full else ()))

    def masked(self) -> int:
        """Zeros in the mask, counted."""
        if lib := native.on(self.flat):
            return lib.gone(self.mask.keep)
        stay = [torch.count_nonzero(self.mask.words(c)) for parts in self.parts for c in parts]
        return self.size - int(torch.stack(stay).sum())

    def check(self, step: int) -> None:
        """The mask has as many zeros as it should, and the weights those and hardly more."""
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
        found["sparsity/total"] = sum(zeros.values()) / self.whole
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
        Clause("prune/weights", "eval", lambda loop: ([], _forgotten(prune.section, loop))),
        Clause("prune/sparsity", "eval", lambda loop: (_asked(prune, loop), loop.pruner.sparsity()), CLOSE),
        Clause("prune/mask", "eval", lambda loop: (loop.pruner.held, loop.pruner.masked())),
        Clause("prune/final", "end", lambda loop: (prune.section.sparsity, loop.pruner.sparsity()), CLOSE),
    )


def _forgotten(section: Any, loop: Any) -> list[str]:
    """Layers of the model that nothing prunes, though the configuration does not spare them."""
    named = {n: m for n, m in loop.built.model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    spared = [n for n, m in named.items() if isinstance(m, nn.Conv2d)][: bool(section.skip_first)]
    spared += [n for n, m in reversed(named.items()) if isinstance(m, nn.Linear)][: bool(section.skip_last)]
    known = {id(p) for p in loop.pruner.weights.values()}
    known |= {id(m.weight) for m in loop.built.model.modules() if isinstance(m, nn.Embedding)}
    left = [n for n, m in named.items() if n not in spared and m.weight.requires_grad and id(m.weight) not in known]
    return [n for n in left if section.pattern is Pattern.FREE or named[n].weight[0].numel() % GROUP == 0]


def _asked(prune: Prune, loop: Any) -> float:
    """What the ramp asks for by now, whether or not an update has heard of it."""
    ramp, step = prune.ramp(loop.total), loop.step
    if ramp.end is None:
        return loop.pruner.wanted
    if step < ramp.warmup:
        return 0.0
    return ramp.target(ramp.end if step >= ramp.end else step - (step - ramp.warmup) % ramp.interval, 0.0)
