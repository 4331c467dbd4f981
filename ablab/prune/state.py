# SPDX-License-Identifier: MIT
"""Pruning by the state of the optimizer: weights, moments and combinations of them as scores.

a = |w|, u = |m|, r = sqrt(v), med the exact median over the live prunable weights, e_y = eps med(y):
    RANDOM   24 bits of a hash of (seed, tensor, index), constant: a placebo
    BITTER0  a^2 u / (r + e_r)
    BITTER1  a; BITTER2 is the same function, a twin
    BITTER3  a sqrt(u + e_u); BITTER4 the same with PRUNE_ALLOC_DEPTH
    BITTER5  -sign(w) m / (r + e_r) + 0.1 a / med(a), or with the other sign in front of the moment (TOWARD)
    BITTER6  a sqrt(u + e_u) u / sqrt(v + e_v)
    BITTER7  a (v + e_v)^(1/4)
    BITTER8  the same in fp16, of A = a / med(a) and V = v / med(v) up to 4000: A rsqrt(rsqrt(V + eps))
    BITTER9  BITTER8 compiled; compiled code keeps fp32 between operations
The scores are those of the public AdamWPrune, with an eps that is relative: masks then do not depend on the scale of
gradients.  AWAY keeps what moves away from zero, as movement pruning does (Sanh et al. 2020,
https://arxiv.org/abs/2005.07683), for Adam moves w by about -m.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from ablab.plugin import Clause
from ablab.prune import Prune
from ablab.prune._masked import Masked, clauses

TOP = 4000.0  # of what BITTER8 computes with in fp16
GOLDEN, MIX1, MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # of splitmix64


class Score(Enum):
    """What is ranked, and the medians that it needs."""

    RANDOM = ("random", "")
    BITTER0 = ("bitter0", "r")
    BITTER1 = ("bitter1", "")
    BITTER2 = ("bitter2", "")
    BITTER3 = ("bitter3", "u")
    BITTER4 = ("bitter4", "u")
    BITTER5 = ("bitter5", "ar")
    BITTER6 = ("bitter6", "uv")
    BITTER7 = ("bitter7", "v")
    BITTER8 = ("bitter8", "av")
    BITTER9 = ("bitter9", "av")


class Direction(Enum):
    """Which moving weights BITTER5 keeps."""

    AWAY = "away"
    TOWARD = "toward"


def splitmix64(x: Tensor) -> Tensor:
    """The generator's output for int64 states, which wrap as its unsigned ones do."""

    def mixed(z: Tensor, shift: int, factor: int) -> Tensor:
        return (z ^ (z >> shift) & ((1 << 64 - shift) - 1)) * signed(factor)

    z = mixed(mixed(x + signed(GOLDEN), 30, MIX1), 27, MIX2)
    return z ^ (z >> 31) & ((1 << 33) - 1)


def signed(x: int) -> int:
    """The int64 of the same bits."""
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)


def in_half(w: Tensor, v: Tensor, med_a: float, med_v: float, eps: float) -> Tensor:
    """BITTER8 and, compiled, BITTER9."""
    A = (w.abs() / med_a).clamp(max=TOP).half()
    V = (v / med_v).clamp(max=TOP).half()
    return (A * torch.rsqrt(torch.rsqrt(V + eps))).float()


class ByState(Masked):
    """Scores of the table above."""

    def __init__(self, network: nn.Module, optimizer: Any, section: Any, ramp: Any, config: Any, seed: int) -> None:
        super().__init__(network, optimizer, section, ramp)
        self.kind, self.eps = config.score, config.eps
        self.absolute = self.kind in (Score.BITTER1, Score.BITTER2)
        self.sign = 1.0 if config.bitter5 is Direction.TOWARD else -1.0
        self.m, self.v = optimizer.flats["exp_avg"], optimizer.flats["exp_avg_sq"]
        self.medians: dict[str, float] = {}
        self.half = torch.compile(in_half, dynamic=True) if self.kind is Score.BITTER9 else in_half
        first = splitmix64(torch.tensor(seed)) + torch.arange(len(self.parts))
        self.streams = {parts[0].start: s for parts, s in zip(self.parts, splitmix64(first).tolist(), strict=True)}

    def prepare(self) -> None:
        self.medians = {name: self.median(name) for name in self.kind.value[1]}

    def of(self, name: str, at: slice) -> Tensor:
        """A quantity of the table."""
        if name == "a":
            return self.flat[at].abs()
        return {"u": self.m[at].abs, "v": self.v[at].clone, "r": self.v[at].sqrt}[name]()

    def median(self, name: str) -> float:
        """The lower median of a quantity over the live weights."""
        return self.at_rank((self.size - self.held + 1) // 2, lambda c: self.of(name, c).float())

    def score(self, at: slice) -> Tensor:
        w, m, v = (t[at].float() for t in (self.flat, self.m, self.v))
        a, u = w.abs(), m.abs()
        e = {name: self.eps * med for name, med in self.medians.items()}
        match self.kind:
            case Score.RANDOM:
                start = max(s for s in self.streams if s <= at.start)
                index = torch.arange(at.start - start, at.stop - start, device=w.device)
                return ((splitmix64(self.streams[start] + index * signed(GOLDEN)) >> 40) & 0xFFFFFF).float()
            case Score.BITTER0:
                return a * a * u / (v.sqrt() + e["r"])
            case Score.BITTER1 | Score.BITTER2:
                return a
            case Score.BITTER3 | Score.BITTER4:
                return a * (u + e["u"]).sqrt()
            case Score.BITTER5:
                return self.sign * w.sign() * m / (v.sqrt() + e["r"]) + 0.1 * a / self.medians["a"]
            case Score.BITTER6:
                return a * (u + e["u"]).sqrt() * u / (v + e["v"]).sqrt()
            case Score.BITTER7:
                return a * (v + e["v"]).sqrt().sqrt()
        return self.half(w, v, self.medians["a"], self.medians["v"], self.eps)


class State(Prune, symbol="PRUNE_STATE"):
    """For optimizers that bring it."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """PRUNE_STATE_*."""

        score: Score
        bitter5: Direction | None
        eps: float | None
        """Relative to the median, in every denominator and root."""

    def build(self, network: nn.Module, optimizer: Any, total: int | None, seed: int) -> Masked:
        return ByState(network, optimizer, self.section, self.ramp(total), self.config, seed)

    def contracts(self) -> tuple[Clause, ...]:
        return clauses(self)
