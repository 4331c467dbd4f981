# SPDX-License-Identifier: MIT
"""A straight line from the peak to the floor."""

from dataclasses import dataclass

from ablab.schedule import Schedule


class Linear(Schedule, symbol="SCHED_LINEAR"):
    """1 - (1 - f) p at progress p."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """SCHED_LINEAR_*."""

        floor: float
        """f, where it ends."""

    def shape(self, progress: float) -> float:
        return 1 - (1 - self.config.floor) * progress
