# SPDX-License-Identifier: MIT
"""Readers of devices and of the host: what the sampler writes once a period.  They set nothing and reset nothing.

A reading has only what was really measured, of busy_pct and mem_busy_pct (share of time that a kernel runs, that the
memory controller is active), sm_pct tensor_pct dram_pct (hardware counters), used_bytes total_bytes own_bytes (of the
device, of the trial's processes), power_w limit_w, energy_j (a counter), temp_c, sm_mhz, mem_mhz, throttle (list of
reasons), shared (true if a process that is not the trial's uses the device) and period_s where the reader is slow.
"""

import math
from abc import abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ablab.plugin import Plugin

HOST = "host"
"""What the host is asked for as, in the place of a device."""
Reading = dict[str, Any]
_ONES = {float((1 << bits) - 1) for bits in (16, 32, 64)}
"""By these, libraries say that there is no such sensor."""


class Telemetry(Plugin, family="TELEM"):
    """One way to read."""

    every_s: ClassVar[float] = 0.0
    """Least seconds between two readings, where one costs a process."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Section:
        """TELEM_*."""

        period_ms: int | None
        """Milliseconds between two samples; None where there are none."""

    @abstractmethod
    def sample(self, device: str, pids: Sequence[int]) -> Reading | None:
        """A reading of the device with this UUID or PCI address, or of HOST; None if it is none of ours.

        `pids` are the processes of the trial, its own first.  Called once a period; must not raise for a device that
        is gone.
        """


def number(value: Any, scale: float = 1.0) -> float | None:
    """A measured value times `scale`; None for what says that there is none: N/A, all ones, nan, below zero."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found * scale if math.isfinite(found) and found >= 0 and found not in _ONES else None


def measured(**values: Any) -> Reading:
    """A reading of what is there; None is left out."""
    return {name: value for name, value in values.items() if value is not None}


def foreign(users: Collection[int] | None, pids: Collection[int]) -> bool | None:
    """Whether somebody else uses a device, by the processes that use it; None if nobody can tell.

    In a container the driver may name processes as the host does, so that none is ours: then one user is taken for
    us and says nothing, two are one too many.
    """
    if users is None or (len(users) == 1 and not set(users) & set(pids)):
        return None
    return bool(set(users) - set(pids))
