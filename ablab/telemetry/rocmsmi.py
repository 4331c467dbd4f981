# SPDX-License-Identifier: MIT
"""AMD GPUs by the JSON of the commands amd-smi and rocm-smi, whose keys changed from ROCm 5 to 7."""

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ablab import machine
from ablab.telemetry import Reading, Telemetry, measured, number

ROCM_SMI = "rocm-smi --showuse --showmemuse --showpower --showmaxpower --showtemp --showmeminfo vram --showuniqueid"
ROCM_SMI += " --showbus --showclocks --json"
AMD_SMI = ("amd-smi list --json", "amd-smi static --asic --json", "amd-smi metric --json")
POWER = ("current socket graphics package power (w)", "average graphics package power (w)")


class Rocmsmi(Telemetry, symbol="TELEM_ROCMSMI"):
    """The last resort: a command takes up to half a second of CPU time, so it runs twice a minute at most."""

    every_s = 30.0

    def __init__(self, config: Any, section: Any, run: machine.Run = machine.command) -> None:
        super().__init__(config, section)
        self._run = run
        self._read_at, self._known = float("-inf"), {}

    def sample(self, device: str, pids: Sequence[int]) -> Reading | None:
        now = time.monotonic()
        if now - self._read_at >= self.every_s:
            self._read_at, self._known = now, dict(self.read())
        found = self._known.get(device) or self._known.get(device.lower())
        return {**found, "period_s": self.every_s} if found else None

    def read(self) -> Iterator[tuple[str, Reading]]:
        """A reading by each name of each device: `GPU-` and its unique id, its PCI address."""
        listed, asic, metric = (_json(self._run(command.split())) for command in AMD_SMI)
        if metric:
            yield from amd_smi(listed, asic, metric)
        else:
            yield from rocm_smi(_json(self._run(ROCM_SMI.split())))


def amd_smi(listed: Any, asic: Any, metric: Any) -> Iterator[tuple[str, Reading]]:
    """From `list`, `static --asic` and `metric`: a list of GPUs, in ROCm 7 below `gpu_data`."""
    names: dict[Any, list[str]] = {}
    for gpu in (*_gpus(listed), *_gpus(asic)):
        names.setdefault(gpu["gpu"], []).extend(_names(_of(gpu, "asic").get("asic_serial"), gpu.get("bdf")))
    for gpu in _gpus(metric):
        usage, power, memory = (_of(gpu, k) for k in ("usage", "power", "mem_usage"))
        heat, clock, energy = (_of(gpu, k) for k in ("temperature", "clock", "energy"))
        temps = (_value(heat.get(k)) for k in ("hotspot", "edge"))
        state = power.get("throttle_status")
        found = measured(
            busy_pct=_value(usage.get("gfx_activity")),
            mem_busy_pct=_value(usage.get("umc_activity")),
            used_bytes=_value(memory.get("used_vram"), 1 << 20),
            total_bytes=_value(memory.get("total_vram"), 1 << 20),
            power_w=_value(power.get("socket_power")),
            energy_j=_value(energy.get("total_energy_consumption")),
            temp_c=next((t for t in temps if t is not None), None),
            sm_mhz=_value((_of(clock, "gfx_0") or _of(clock, "gfx")).get("clk")),
            mem_mhz=_value((_of(clock, "mem_0") or _of(clock, "mem")).get("clk")),
            throttle={"UNTHROTTLED": [], "THROTTLED": ["throttled"]}.get(state) if isinstance(state, str) else None,
        )
        yield from ((name, found) for name in names.get(gpu["gpu"], ()))


def rocm_smi(cards: Mapping[str, Any]) -> Iterator[tuple[str, Reading]]:
    """From one object with a key for each card.

    NOTE `GPU memory use (%)` of ROCm 5 is the activity of the memory controller; ROCm 6 calls that `Memory Read/Write
    Activity` and has `GPU Memory Allocated (VRAM%)` beside it, which is no activity.
    """
    for card, facts in (cards if isinstance(cards, Mapping) else {}).items():
        if not card.startswith("card"):
            continue
        f = {k.lower().rstrip(":"): v for k, v in facts.items()}
        heat = (number(f.get(f"temperature (sensor {k}) (c)")) for k in ("junction", "edge"))
        activity = ("gpu memory read/write activity (%)", "gpu memory use (%)")
        found = measured(
            busy_pct=number(f.get("gpu use (%)")),
            mem_busy_pct=next((n for k in activity if (n := number(f.get(k))) is not None), None),
            used_bytes=number(f.get("vram total used memory (b)")),
            total_bytes=number(f.get("vram total memory (b)")),
            power_w=next((n for k in POWER if (n := number(f.get(k))) is not None), None),
            limit_w=number(f.get("max graphics package power (w)")),
            temp_c=next((t for t in heat if t is not None), None),
            sm_mhz=_mhz(f.get("sclk clock speed")),
            mem_mhz=_mhz(f.get("mclk clock speed")),
        )
        yield from ((name, found) for name in _names(f.get("unique id"), f.get("pci bus")))


def _names(unique: Any, pci: Any) -> list[str]:
    serial = str(unique or "").removeprefix("0x").lower()
    known = [f"GPU-{serial:>016}"] if re.fullmatch("[0-9a-f]+", serial) and serial.strip("0") else []
    return known + ([str(pci).lower()] if pci else [])


def _gpus(found: Any) -> list[dict[str, Any]]:
    found = found.get("gpu_data", []) if isinstance(found, dict) else found
    return [g for g in found or () if isinstance(g, dict) and "gpu" in g]


def _of(found: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A section; it too may be N/A."""
    section = found.get(key)
    return section if isinstance(section, dict) else {}


def _value(found: Any, scale: float = 1.0) -> float | None:
    """A number, or {value, unit}; N/A and all ones are none."""
    return number(found.get("value") if isinstance(found, dict) else found, scale)


def _mhz(text: Any) -> float | None:
    digits = re.search(r"\d+", str(text or ""))
    return number(digits[0]) if digits else None


def _json(text: str) -> Any:
    """Warnings may come before it; nothing for what is none."""
    starts = [i for c in "[{" if (i := text.find(c)) >= 0]
    try:
        return json.loads(text[min(starts) :]) if starts else None
    except ValueError:
        return None
