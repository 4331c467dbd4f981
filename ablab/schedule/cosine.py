# SPDX-License-Identifier: MIT
"""Half a cosine from the peak to the floor (Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983)."""

import math
from dataclasses import dataclass

from ablab.schedule import Schedule


class Cosine(Schedule, symbol="SCHED_COSINE"):
    """f + (1 - f) (1 + cos(pi p)) / 2 at progress p; without restarts, unlike the paper."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """SCHED_COSINE_*."""

        floor: float
        """f, where it ends."""

    def shape(self, progress: float) -> float:
        floor = self.config.floor
        return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2
