# SPDX-License-Identifier: MIT
"""AMD GPUs by the Python package amdsmi, which comes with ROCm and fits the driver that it came with."""

import sys
from collections.abc import Sequence
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from os.path import dirname
from typing import Any

from ablab.telemetry import Reading, Telemetry, foreign, measured, number

ROCM = "/opt/rocm/share/amd_smi/amdsmi/__init__.py"  # where ROCm puts it when it is not installed into this Python
WATT = 1e4  # power caps above are in microwatts: their unit changed between releases
REASONS = {
    "active_prochot_thrm": "hw_thermal",
    "active_ppt_pwr": "power_cap",
    "active_socket_thrm": "hw_thermal",
    "active_vr_thrm": "vr_thermal",
    "active_hbm_thrm": "memory_thermal",
}


def identity(handle: Any, ask: Any) -> set[str]:
    """The names that a device is known by: `GPU-` and its unique id, and its PCI address."""
    serial = str((ask("amdsmi_get_gpu_asic_info", handle) or {}).get("asic_serial", "")).removeprefix("0x").lower()
    found = {str(ask("amdsmi_get_gpu_device_bdf", handle) or "").lower()}
    return (found | ({f"GPU-{serial:>016}"} if serial.strip("0") and serial != "n/a" else set())) - {""}


class Amdsmi(Telemetry, symbol="TELEM_AMDSMI"):
    """Nothing where there is no ROCm; what a device does not have is `N/A` or all ones and is absent."""

    def __init__(self, config: Any, section: Any, library: Any = None) -> None:
        super().__init__(config, section)
        self.library = library or _library()
        self._handles: dict[str, Any] = {}
        if self.library is not None and self._ask("amdsmi_init") is not Amdsmi._refused:
            for handle in self._ask("amdsmi_get_processor_handles") or ():
                self._handles |= dict.fromkeys(identity(handle, self._ask), handle)

    def sample(self, device: str, pids: Sequence[int]) -> Reading | None:
        handle = self._handles.get(device) or self._handles.get(device.lower())
        if handle is None:
            return None
        ask, lib = self._ask, self.library
        busy, power = ask("amdsmi_get_gpu_activity", handle) or {}, ask("amdsmi_get_power_info", handle) or {}
        vram, energy = ask("amdsmi_get_gpu_vram_usage", handle) or {}, ask("amdsmi_get_energy_count", handle) or {}
        cap = number((ask("amdsmi_get_power_cap_info", handle) or {}).get("power_cap"))
        limits, users = ask("amdsmi_get_violation_status", handle), ask("amdsmi_get_gpu_process_list", handle)
        users = None if users is None else [u for u in users if isinstance(u, dict)]
        own = [number(u["memory_usage"]["vram_mem"]) for u in users or () if u["pid"] in pids]
        heat = (lib.AmdSmiTemperatureType.HOTSPOT, lib.AmdSmiTemperatureMetric.CURRENT)
        watts = (number(power.get(k)) for k in ("current_socket_power", "socket_power", "average_socket_power"))
        clocks = (ask("amdsmi_get_clock_info", handle, getattr(lib.AmdSmiClkType, k)) or {} for k in ("GFX", "MEM"))
        sm_mhz, mem_mhz = (number(c.get("clk", c.get("cur_clk"))) for c in clocks)
        count = number(energy.get("energy_accumulator", energy.get("power")))
        return measured(
            busy_pct=number(busy.get("gfx_activity")),
            mem_busy_pct=number(busy.get("umc_activity")),
            used_bytes=number(vram.get("vram_used"), 1 << 20),
            total_bytes=number(vram.get("vram_total"), 1 << 20),
            own_bytes=sum(filter(None, own)) if own else None,
            power_w=next((w for w in watts if w), None),  # a sensor that it lacks reads 0 in some releases
            limit_w=cap and (cap * 1e-6 if cap > WATT else cap),
            energy_j=count and count * energy["counter_resolution"] * 1e-6,
            temp_c=number(ask("amdsmi_get_temp_metric", handle, *heat)),
            sm_mhz=sm_mhz,
            mem_mhz=mem_mhz,
            throttle=limits and sorted({name for key, name in REASONS.items() if limits.get(key) is True}),
            shared=foreign(None if users is None else {u["pid"] for u in users}, pids),
        )

    def _ask(self, name: str, *arguments: Any) -> Any:
        """The value of a function, None where it does not exist in this release or refuses."""
        if not hasattr(self.library, name):
            return None
        try:
            return getattr(self.library, name)(*arguments)
        except self.library.AmdSmiException:
            return Amdsmi._refused if name == "amdsmi_init" else None

    _refused = object()


def _library() -> Any:
    """The package, None without ROCm; importing it loads the driver's library, which may fail in its own ways."""
    try:
        spec = find_spec("amdsmi") or spec_from_file_location(
            "amdsmi", ROCM, submodule_search_locations=[dirname(ROCM)]
        )
        sys.modules["amdsmi"] = module = module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except (ImportError, OSError, KeyError, AttributeError):
        sys.modules.pop("amdsmi", None)
        return None
