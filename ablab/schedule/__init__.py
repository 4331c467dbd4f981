# SPDX-License-Identifier: MIT
"""Learning rate schedules: pure functions of progress, the only writers of a group's lr."""

from abc import abstractmethod
from dataclasses import dataclass

from ablab.plugin import Plugin


class Schedule(Plugin, family="SCHED"):
    """Base of the schedules."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Section:
        """SCHED_* symbols that every schedule shares."""

        warmup: int
        """Steps of linear warm-up; 0 is none."""

    @abstractmethod
    def shape(self, progress: float) -> float:
        """Factor on the peak rate at `progress` in (0, 1], the used share of the budget; no warm-up in it."""

    def scale(self, step: int, progress: float) -> float:
        """Factor on the peak rate for step number `step` (first 1), called by the loop before that step.

        `progress` is step / total for a budget counted in steps and used / limit under a time budget.
        """
        warm = min(1.0, step / self.section.warmup) if self.section.warmup else 1.0
        return warm * self.shape(progress)
