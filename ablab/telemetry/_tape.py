# SPDX-License-Identifier: MIT
"""A recording of what this machine's libraries, files and commands tell of its devices, for tests elsewhere.

Identities are hashed, each to the same hash everywhere and to its own form; names of processes are left out.
"""

import ctypes
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from ablab import machine
from ablab.telemetry.amdsmi import Amdsmi, _library
from ablab.telemetry.nvml import Nvml, pynvml
from ablab.telemetry.rocmsmi import Rocmsmi
from ablab.telemetry.sysfs import Sysfs

SECRET = re.compile(r"(?:GPU-|MIG-|0x|\b)(?:[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F-]{22}|[0-9a-fA-F]{14,16})\b")
UNIQUE = re.compile(r"(?<=unique_id )\d+")  # KFD writes in decimal what sysfs writes in hex
SYSFS = ("sys/class/drm/card[0-9]*/device", "sys/class/kfd/kfd/topology/nodes/*")
FILES = "vendor unique_id gpu_busy_percent mem_busy_percent mem_info_vram_* gpu_id properties hwmon/hwmon*/*_*"
SAMPLES = 3  # counters show what they do


class Tape:
    """A library whose answers are written down: `function argument ..` -> answers, in order; a refusal is
    {"error": code}."""

    def __init__(self, library: Any) -> None:
        self._library, self._names = library, {}
        self.calls: dict[str, list[Any]] = {}

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._library, name)
        if not callable(value) or isinstance(value, type):
            return value

        def call(*arguments: Any) -> Any:
            told = self.calls.setdefault(" ".join([name, *map(self._plain, arguments)]), [])
            try:
                found = value(*arguments)
            except Exception as error:
                told.append({"error": getattr(error, "value", None) or str(error)})
                raise
            if name == "nvmlDeviceGetHandleByUUID":
                self._names[id(found)] = (arguments[0], found)
            for place, handle in enumerate(found if name == "amdsmi_get_processor_handles" else ()):
                self._names[id(handle)] = (str(place), handle)  # kept: a freed handle would give its id away
            told.append(plain(found))
            return found

        return call

    def _plain(self, argument: Any) -> str:
        if isinstance(argument, int | str):
            return str(int(argument) if isinstance(argument, Enum) else argument)
        return self._names.get(id(argument), ("-",))[0]


def plain(value: Any) -> Any:
    """JSON of an answer: structures by field, of an array what is in use, None for a handle."""
    if isinstance(value, list | tuple | ctypes.Array):
        return [plain(v) for v in value if getattr(v, "metricId", 1)]
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k != "name"}
    if isinstance(value, ctypes.Structure):
        return {name: plain(getattr(value, name)) for name, *_ in value._fields_}
    if isinstance(value, str | int | float | bool | None):
        return int(value) if isinstance(value, Enum) else value
    return plain(vars(value)) if hasattr(value, "__dict__") and "Pointer" not in type(value).__name__ else None


def record(root: Path = Path("/"), run: machine.Run = machine.command, pause: Callable[[], None] = lambda: None) -> str:
    """The recording of all devices here, as JSON; `pause` is called between samples."""
    found: dict[str, Any] = {"devices": [d.uuid for d in machine.inventory(root=root).devices]}
    nvml, told = Tape(pynvml), {}
    readers: list[Any] = [Nvml(None, None, nvml), Sysfs(None, None, root)]
    rocm = Tape(library) if (library := _library()) else None
    readers += [Amdsmi(None, None, rocm)] if rocm else []

    def heard(command: Sequence[str]) -> str:
        told[" ".join(command)] = text = run(command)
        return text

    for sample in range(SAMPLES):
        for device in found["devices"]:
            for reader in readers:
                reader.sample(device, ())
        if sample < SAMPLES - 1:
            pause()
    dict(Rocmsmi(None, None, heard).read())
    folders = [f for pattern in SYSFS for f in sorted(root.glob(pattern))]
    files = {p for f in folders for pattern in FILES.split() for p in f.glob(pattern) if p.is_file()}
    links = {str(f.relative_to(root)): str(f.resolve().name) for f in folders if f.is_symlink()}
    texts = {str(p.relative_to(root)): UNIQUE.sub(_decimal, p.read_text(errors="replace")) for p in sorted(files)}
    found |= {"nvml": nvml.calls, "amdsmi": rocm.calls if rocm else {}, "links": links}
    found |= {"sysfs": texts, "commands": {k: v for k, v in told.items() if v}}
    return SECRET.sub(_hashed, json.dumps({"schema": "ablab.telemetry-recording/1", **found}, indent=1)) + "\n"


def _decimal(match: re.Match[str]) -> str:
    return str(int(_other(f"{int(match[0]):x}"), 16))


def _hashed(match: re.Match[str]) -> str:
    head = re.match("GPU-|MIG-|0x", match[0])
    return (head[0] if head else "") + _other(match[0][head.end() if head else 0 :])


def _other(text: str) -> str:
    """Other hex digits in the same places; leading zeros stay, for some write them and some do not."""
    bare = text.lstrip("0").lower()
    digits = iter(hashlib.sha256(bare.replace("-", "").encode()).hexdigest())
    return text[: len(text) - len(bare)] + "".join("-" if c == "-" else next(digits) for c in bare)
