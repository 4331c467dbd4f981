# SPDX-License-Identifier: MIT
"""The peak until the end."""

from ablab.schedule import Schedule


class Constant(Schedule, symbol="SCHED_CONSTANT"):
    """1 at any progress."""

    def shape(self, progress: float) -> float:
        return 1.0
