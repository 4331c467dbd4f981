# SPDX-License-Identifier: MIT
"""AMD GPUs by the files of the amdgpu driver: no library, no process, and no throttle reasons."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ablab.telemetry import Reading, Telemetry, foreign, measured, number


class Sysfs(Telemetry, symbol="TELEM_SYSFS"):
    """/sys/class/drm, hwmon, KFD and /proc/<pid>/fdinfo."""

    def __init__(self, config: Any, section: Any, root: Path = Path("/")) -> None:
        super().__init__(config, section)
        self._root = root
        self._folders: dict[str, Path] = {}
        for folder in sorted(root.glob("sys/class/drm/card[0-9]*/device")):
            if _text(folder / "vendor") == "0x1002":
                self._folders[_pci(folder)] = folder
                if unique := _text(folder / "unique_id"):
                    self._folders[f"GPU-{unique:>016}"] = folder

    def sample(self, device: str, pids: Sequence[int]) -> Reading | None:
        if (folder := self._folders.get(device) or self._folders.get(device.lower())) is None:
            return None
        heat = next(iter(sorted(folder.glob("hwmon/hwmon*"))), folder / "hwmon")
        power = (number(_text(heat / f"power1_{kind}"), 1e-6) for kind in ("average", "input"))
        users = self._users(folder)
        memory = [n for pid in pids if (n := self._vram(pid, _pci(folder))) is not None]
        return measured(
            busy_pct=number(_text(folder / "gpu_busy_percent")),
            mem_busy_pct=number(_text(folder / "mem_busy_percent")),
            used_bytes=number(_text(folder / "mem_info_vram_used")),
            total_bytes=number(_text(folder / "mem_info_vram_total")),
            own_bytes=sum(memory) if memory else None,
            power_w=next((w for w in power if w is not None), None),
            limit_w=number(_text(heat / "power1_cap"), 1e-6),
            energy_j=number(_text(heat / "energy1_input"), 1e-6),
            temp_c=_junction(heat),
            sm_mhz=number(_text(heat / "freq1_input"), 1e-6),
            mem_mhz=number(_text(heat / "freq2_input"), 1e-6),
            shared=foreign(users, pids),
        )

    def _users(self, folder: Path) -> set[int] | None:
        """Processes with memory on the device, by KFD; None where it does not list them."""
        nodes = self._root.glob("sys/class/kfd/kfd/topology/nodes/*")
        unique = _text(folder / "unique_id")
        ids = [_text(n / "gpu_id") for n in nodes if unique and int(unique, 16) == _property(n, "unique_id")]
        places = self._root / "sys/class/kfd/kfd/proc"
        if not ids or not places.is_dir():
            return None
        return {int(p.name) for p in places.iterdir() if p.name.isdecimal() and number(_text(p / f"vram_{ids[0]}"))}

    def _vram(self, pid: int, pci: str) -> int | None:
        """Bytes of a process on a device by fdinfo; a client with several descriptors counts once."""
        clients = {}
        for text in map(_text, _within(self._root / f"proc/{pid}/fdinfo")):
            facts = dict(re.findall(r"^(drm-[\w-]+):\s*(.+)$", text, re.MULTILINE))
            kib = facts.get("drm-memory-vram", facts.get("drm-total-vram", "")).removesuffix(" KiB")
            if facts.get("drm-pdev", "").lower() == pci and kib.isdecimal():
                clients[facts.get("drm-client-id")] = int(kib) << 10
        return sum(clients.values()) if clients else None


def _pci(folder: Path) -> str:
    return folder.resolve().name.lower()


def _junction(heat: Path) -> float | None:
    """Degrees of the hottest place where it is told, else of the edge."""
    labels = {_text(p): p.name.removesuffix("_label") for p in sorted(heat.glob("temp*_label"))}
    name = labels.get("junction") or labels.get("edge") or "temp1"
    return number(_text(heat / f"{name}_input"), 1e-3)


def _property(node: Path, name: str) -> int | None:
    found = re.search(rf"^{name} (\d+)$", _text(node / "properties"), re.MULTILINE)
    return int(found[1]) if found else None


def _within(folder: Path) -> Iterator[Path]:
    try:
        yield from folder.iterdir()
    except OSError:  # it ended, or is not ours
        return


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
