# SPDX-License-Identifier: MIT
"""Learning rate schedules: pure functions of progress, the only writers of a group's lr.

The coupling schedule, which all of them share, is `_coupling.py`.
"""

from abc import abstractmethod
from dataclasses import dataclass

from ablab.plugin import Plugin
from ablab.schedule._coupling import Onset


class Schedule(Plugin, family="SCHED"):
    """Base of the schedules."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Section:
        """SCHED_* symbols that every schedule shares."""

        warmup: int
        """Steps of linear warm-up; 0 is none."""
        coupling: Onset | None
        """None where the model has nothing to couple."""
        coupling_start: int | None
        coupling_steps: int | None
        """Of the ramp; 0 jumps."""
        coupling_window: int | None
        """Losses looked at."""
        coupling_cv: float | None
        """Standard deviation over mean below which a loss is steady."""
        coupling_deadline: int | None
        """Step at which the ramp starts whatever the loss does; 0 is none."""

        @property
        def ramps(self) -> bool:
            """The couplings are off at first."""
            return self.coupling not in (None, Onset.CONSTANT)

    @abstractmethod
    def shape(self, progress: float) -> float:
        """Factor on the peak rate at `progress` in (0, 1], the used share of the budget; no warm-up in it."""

    def scale(self, step: int, progress: float) -> float:
        """Factor on the peak rate for step number `step` (first 1), called by the loop before that step.

        `progress` is step / total for a budget counted in steps and used / limit under a time budget.
        """
        warm = min(1.0, step / self.section.warmup) if self.section.warmup else 1.0
        return warm * self.shape(progress)
