# SPDX-License-Identifier: MIT
"""How many weights are zero after which step: a curve between two sparsities."""

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple


class Curve(Enum):
    """Shape of the ramp over y in 0..1, from s0 to s1."""

    LINEAR = "linear"
    """s0 + (s1 - s0) y."""
    CUBIC_IN = "cubic_in"
    """s0 + (s1 - s0) y^3: late and steep."""
    CUBIC_ZG = "cubic_zg"
    """s1 + (s0 - s1) (1 - y)^3: early (Zhu and Gupta 2017, https://arxiv.org/abs/1710.01878)."""


class Ramp(NamedTuple):
    """From sparsity `initial` after step `warmup` to `final` after step `end`."""

    initial: float
    final: float
    curve: Curve
    warmup: int
    interval: int
    end: int | None
    """None under a budget of seconds: then it ends at `fraction` of it, and y is progress / fraction."""
    fraction: float | None

    def share(self, step: int, progress: float) -> float:
        """y, the share of the ramp that is done."""
        if step < self.warmup:
            return 0.0
        if self.end is None:
            return min(1.0, progress / self.fraction)
        return min(1.0, (step - self.warmup) / (self.end - self.warmup))

    def target(self, step: int, progress: float) -> float:
        """Sparsity that is asked for after a step."""
        y, rise = self.share(step, progress), self.final - self.initial
        if y == 1:
            return self.final
        return {
            Curve.LINEAR: self.initial + rise * y,
            Curve.CUBIC_IN: self.initial + rise * y**3,
            Curve.CUBIC_ZG: self.final - rise * (1 - y) ** 3,
        }[self.curve]

    def due(self, step: int, progress: float) -> bool:
        """True if masks change after this step: on the grid of `interval`, and where the ramp ends."""
        if step < self.warmup or (self.end is not None and step > self.end):
            return False
        return (step - self.warmup) % self.interval == 0 or self.share(step, progress) == 1


def by_depth(sizes: Sequence[int], share: float, cap: float) -> list[float]:
    """Shares of layers that grow with depth, at most `cap`, with the mean `share` over all elements.

    s_l = min(cap, z q_l), q_l from 0.7 in the first layer to 1.3 in the last, z so that sum n_l s_l = s N.
    """
    last = len(sizes) - 1
    weights = [0.7 + 0.6 * layer / last if last else 1.0 for layer in range(len(sizes))]
    full: set[int] = set()  # layers at the cap
    while True:
        rest = [i for i in range(len(sizes)) if i not in full]
        left = share * sum(sizes) - cap * sum(sizes[i] for i in full)
        z = left / sum(sizes[i] * weights[i] for i in rest) if rest else 0.0
        more = {i for i in rest if z * weights[i] > cap}
        if not more:
            return [cap if i in full else z * q for i, q in enumerate(weights)]
        full |= more
