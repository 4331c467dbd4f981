# SPDX-License-Identifier: MIT
"""Warm-up, stable, decay: the peak, then a line to the floor (Hu et al. 2024, https://arxiv.org/abs/2404.06395)."""

from dataclasses import dataclass

from ablab.schedule import Schedule


class Wsd(Schedule, symbol="SCHED_WSD"):
    """1 until progress 1 - d, then a straight line to f; the paper decays exponentially."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """SCHED_WSD_*."""

        floor: float
        """f, where it ends."""
        decay: float
        """d, the last part of the budget, which decays."""

    def shape(self, progress: float) -> float:
        done = max(0.0, (progress - 1 + self.config.decay) / self.config.decay)
        return 1 - (1 - self.config.floor) * done
