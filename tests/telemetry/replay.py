# SPDX-License-Identifier: MIT
"""Readers that find the machine of a recording: its libraries, files and commands, answered as they were."""

import json
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml

from ablab.telemetry import Telemetry
from ablab.telemetry.amdsmi import Amdsmi
from ablab.telemetry.nvml import Nvml
from ablab.telemetry.rocmsmi import Rocmsmi
from ablab.telemetry.sysfs import Sysfs

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = sorted(p.stem for p in FIXTURES.glob("*.json"))


class Clk(IntEnum):
    GFX = 1
    MEM = 5


class Heat(IntEnum):
    HOTSPOT = 1


class Now(IntEnum):
    CURRENT = 0


class AmdError(Exception):
    pass


AMD = SimpleNamespace(
    AmdSmiException=AmdError, AmdSmiClkType=Clk, AmdSmiTemperatureType=Heat, AmdSmiTemperatureMetric=Now
)


class Handle(str):
    """What a library hands out for a device: its name in the recording."""


class Library:
    """Answers each call from a recording, in order, the last one for ever; `real` has types and constants."""

    def __init__(self, calls: dict[str, list[Any]], real: Any, error: Any) -> None:
        self._calls, self._real, self._error = calls, real, error

    def __getattr__(self, name: str) -> Any:
        if name.startswith("amdsmi_") and not any(key.split()[0] == name for key in self._calls):
            raise AttributeError(name)
        if not any(key.split()[0] == name for key in self._calls) and not name.startswith("nvml"):
            return getattr(self._real, name)

        def call(*arguments: Any) -> Any:
            words = [
                str(int(a)) if isinstance(a, int) else a if isinstance(a, Handle | str) else "-" for a in arguments
            ]
            told = self._calls.get(" ".join([name, *words]), [{"error": 3}])
            answer = told.pop(0) if len(told) > 1 else told[0]
            if isinstance(answer, dict) and "error" in answer:
                raise self._error(answer["error"])
            if name == "nvmlDeviceGetHandleByUUID":
                return Handle(arguments[0])
            if name == "nvmlGpmSampleAlloc":
                return pynvml.c_nvmlGpmSample_t(pynvml.struct_c_nvmlGpmSample_t())
            if name == "nvmlGpmMetricsGet":
                for place, metric in enumerate(answer["metrics"]):
                    slot = arguments[0].metrics[place]
                    assert slot.metricId == metric["metricId"]
                    slot.nvmlReturn, slot.value = metric["nvmlReturn"], metric["value"]
                return arguments[0]
            if name == "amdsmi_get_processor_handles":
                return [Handle(i) for i in range(len(answer))]
            return answer if name.startswith("amdsmi_") else friendly(answer)

        return call


def friendly(value: Any) -> Any:
    """Objects where NVML has structures."""
    if isinstance(value, list):
        return [friendly(v) for v in value]
    return SimpleNamespace(**value) if isinstance(value, dict) else value


def load(name: str) -> dict[str, Any]:
    return json.loads((FIXTURES / f"{name}.json").read_text())


def lay(found: dict[str, Any], root: Path) -> Path:
    """The files of a recording below `root`."""
    for place, target in found["links"].items():
        real = root / "sys/devices" / target
        real.mkdir(parents=True)
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).symlink_to(real)
    for place, text in found["sysfs"].items():
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_text(text)
    return root


def readers(found: dict[str, Any], root: Path) -> list[Telemetry]:
    """All of them, in the order of the configuration, on the machine of a recording."""
    commands = found["commands"]
    return [
        Nvml(None, None, Library(found["nvml"], pynvml, pynvml.NVMLError)),
        Amdsmi(None, None, Library(found["amdsmi"], AMD, AmdError)),
        Sysfs(None, None, lay(found, root)),
        Rocmsmi(None, None, lambda command: commands.get(" ".join(command), "")),
    ]
