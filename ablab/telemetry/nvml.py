# SPDX-License-Identifier: MIT
"""NVIDIA GPUs and MIG slices by nvidia-ml-py."""

from collections.abc import Sequence
from typing import Any

import pynvml

from ablab.telemetry import Reading, Telemetry, foreign, measured, number

REASONS = {  # bits of the clock event reasons that slow a device down; idle and what a user has set are none
    0x04: "power_cap",
    0x08: "hw_slowdown",
    0x20: "sw_thermal",
    0x40: "hw_thermal",
    0x80: "power_brake",
    0x200: "board_limit",
    0x400: "reliability",
}
GPM = {"sm_pct": 2, "tensor_pct": 5, "dram_pct": 10}  # NVML_GPM_METRIC_*: SM_UTIL, ANY_TENSOR_UTIL, DRAM_BW_UTIL


class Nvml(Telemetry, symbol="TELEM_NVML"):
    """What a device refuses, for want of support or permission, is absent.  Of a MIG slice, memory and users are its
    own; power, energy, clocks and utilization are those of the whole device or not there, so they are left out."""

    def __init__(self, config: Any, section: Any, library: Any = pynvml) -> None:
        super().__init__(config, section)
        self.library = library
        self._handles: dict[str, Any] = {}
        self._gpm: dict[str, Any] = {}
        """Counters at the last reading; None for a device without them."""
        try:
            library.nvmlInit()
            self._there = True
        except library.NVMLError:
            self._there = False

    def sample(self, device: str, pids: Sequence[int]) -> Reading | None:
        if not self._there or not device.startswith(("GPU-", "MIG-")):
            return None
        if device not in self._handles:
            if (handle := self._ask("nvmlDeviceGetHandleByUUID", device)) is None:
                return None
            self._handles[device] = handle
        handle = self._handles[device]
        memory = self._ask("nvmlDeviceGetMemoryInfo", handle)
        users = self._ask("nvmlDeviceGetComputeRunningProcesses", handle)
        own = [number(p.usedGpuMemory) for p in users or () if p.pid in pids]
        found = measured(
            used_bytes=number(memory and memory.used),
            total_bytes=number(memory and memory.total),
            own_bytes=sum(filter(None, own)) if own else None,
            shared=foreign(None if users is None else {p.pid for p in users}, pids),
        )
        if device.startswith("MIG-"):
            return found
        busy, reasons = (
            self._ask(f"nvmlDeviceGet{name}", handle) for name in ("UtilizationRates", "CurrentClocksEventReasons")
        )
        return found | measured(
            busy_pct=number(busy and busy.gpu),
            mem_busy_pct=number(busy and busy.memory),
            power_w=number(self._ask("nvmlDeviceGetPowerUsage", handle), 1e-3),
            limit_w=number(self._ask("nvmlDeviceGetEnforcedPowerLimit", handle), 1e-3),
            energy_j=number(self._ask("nvmlDeviceGetTotalEnergyConsumption", handle), 1e-3),
            temp_c=number(self._ask("nvmlDeviceGetTemperature", handle, 0)),  # NVML_TEMPERATURE_GPU
            sm_mhz=number(self._ask("nvmlDeviceGetClockInfo", handle, 1)),  # NVML_CLOCK_SM
            mem_mhz=number(self._ask("nvmlDeviceGetClockInfo", handle, 2)),  # NVML_CLOCK_MEM
            throttle=None if reasons is None else [name for bit, name in REASONS.items() if reasons & bit],
            **self._counters(device, handle),
        )

    def _counters(self, device: str, handle: Any) -> Reading:
        """GPM, the means since the last reading; nothing at the first one and before Hopper."""
        lib = self.library
        if device not in self._gpm:
            support = self._ask("nvmlGpmQueryDeviceSupport", handle)
            self._gpm[device] = support and support.isSupportedDevice and self._ask("nvmlGpmSampleAlloc")
            if self._gpm[device]:
                self._ask("nvmlGpmSampleGet", handle, self._gpm[device])
            return {}
        if not (before := self._gpm[device]) or not (now := self._ask("nvmlGpmSampleAlloc")):
            return {}
        self._ask("nvmlGpmSampleGet", handle, now)
        asked = lib.c_nvmlGpmMetricsGet_t()
        asked.version, asked.numMetrics = lib.NVML_GPM_METRICS_GET_VERSION, len(GPM)
        asked.sample1, asked.sample2 = before, now
        for place, metric in enumerate(GPM.values()):
            asked.metrics[place].metricId = metric
        told = self._ask("nvmlGpmMetricsGet", asked)
        self._ask("nvmlGpmSampleFree", before)
        self._gpm[device] = now
        if told is None:
            return {}
        return {n: number(told.metrics[i].value) for i, n in enumerate(GPM) if not told.metrics[i].nvmlReturn}

    def _ask(self, name: str, *arguments: Any) -> Any:
        """The value of a function, None where the device or the driver refuses."""
        try:
            return getattr(self.library, name)(*arguments)
        except self.library.NVMLError:
            return None
