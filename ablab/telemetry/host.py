# SPDX-License-Identifier: MIT
"""CPU time and memory of a trial's processes."""

from collections.abc import Sequence
from typing import Any

import psutil

from ablab.telemetry import HOST, Reading, Telemetry


class Host(Telemetry, symbol="TELEM_HOST"):
    """By psutil.  cpu_s and loader_cpu_s are seconds since the last reading, of all processes and of the children.

    NOTE memory that processes share counts once for each of them.
    """

    def __init__(self, config: Any, section: Any) -> None:
        super().__init__(config, section)
        self._known: dict[int, tuple[psutil.Process, float]] = {}
        """Process and its CPU seconds at the last reading."""

    def sample(self, device: str, pids: Sequence[int]) -> Reading | None:
        if device != HOST:
            return None
        used, rss, began = [], 0, bool(pids) and pids[0] not in self._known
        for pid in pids:
            try:
                process, before = self._known.get(pid) or (psutil.Process(pid), 0.0)
                with process.oneshot():
                    times, memory = process.cpu_times(), process.memory_info()
            except psutil.Error:
                self._known.pop(pid, None)
                continue
            seconds = times.user + times.system
            self._known[pid] = process, seconds
            used.append(seconds - before if seconds >= before else seconds)  # less: another process has its pid now
            rss += memory.rss
        if not used:
            return {}
        if began:  # what it used before we looked belongs to no interval
            return {"rss_bytes": rss}
        loader = {"loader_cpu_s": round(sum(used[1:]), 3)} if len(used) > 1 else {}
        return {"rss_bytes": rss, "cpu_s": round(sum(used), 3), **loader}
