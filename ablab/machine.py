# SPDX-License-Identifier: MIT
"""Device inventory without torch: cores, memory, GPUs by UUID, and what identifies a process."""

import csv
import json
import os
import platform
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ablab.kconf import ranked

Run = Callable[[Sequence[str]], str]
"""Runs a command and returns what it prints; '' when it fails or is not there."""

COMPILERS = ("g++", "c++", "clang++")
"""Of the native kernels; the first that is there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One GPU that a trial can be given."""

    kind: str
    """`cuda` or `rocm`."""
    name: str
    uuid: str
    """What CUDA_VISIBLE_DEVICES or ROCR_VISIBLE_DEVICES take; never an index."""
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What this process may use."""

    cores: tuple[int, ...]
    memory_bytes: int
    cpu: str
    devices: tuple[Device, ...]
    host: str
    boot_id: str


class Gpu(NamedTuple):
    """Peaks of one device."""

    bf16: float
    """Dense TFLOP/s."""
    fp32: float
    """By TF32 where there is TF32."""
    gib: float
    gbs: float
    """Memory bandwidth, 1e9 bytes a second."""
    watts: float
    """Of the board at full load."""


USABLE = 0.93  # of the memory that is there: error correction and the driver take up to 7 %
CATALOGUE = "datasheets of the makers, 2026-11"
# The first name that fits counts.  An MI250 is two devices: half of its datasheet.
PEAKS = {
    "H200": Gpu(989.0, 495.0, 141, 4800, 700),
    "H100 PCIe": Gpu(756.0, 378.0, 80, 2000, 350),
    "H100 NVL": Gpu(835.0, 418.0, 94, 3900, 400),
    "H100": Gpu(989.0, 495.0, 80, 3350, 700),
    "B200": Gpu(2250.0, 1125.0, 180, 8000, 1000),
    "A100-SXM4-80GB": Gpu(312.0, 156.0, 80, 2039, 400),
    "A100 80GB": Gpu(312.0, 156.0, 80, 1935, 300),
    "A100": Gpu(312.0, 156.0, 40, 1555, 400),
    "A10G": Gpu(70.0, 35.0, 24, 600, 300),
    "L40S": Gpu(362.0, 183.0, 48, 864, 350),
    "L40": Gpu(181.0, 90.5, 48, 864, 300),
    "L4": Gpu(121.0, 60.0, 24, 300, 72),
    "RTX 4090": Gpu(165.0, 83.0, 24, 1008, 450),
    "RTX 3090": Gpu(71.0, 36.0, 24, 936, 350),
    "MI300X": Gpu(1307.0, 654.0, 192, 5300, 750),
    "MI250X": Gpu(191.5, 47.9, 64, 1638, 280),
    "MI250": Gpu(181.0, 45.3, 64, 1638, 280),
    "W7900": Gpu(123.0, 61.0, 48, 864, 295),
}


def listed(name: str) -> Gpu | None:
    """The GPU that torch calls `name`, by its datasheet."""
    return next((gpu for key, gpu in PEAKS.items() if key in name), None)


def kind(name: str) -> str:
    """The catalogue's key of a device, else the name itself: what one learns of one A10G goes for all."""
    return next((key for key in PEAKS if key in name), name)


def named(text: str) -> str:
    """The key of the GPU that a user calls `text`, whatever the case, blanks and dashes.  Raises ValueError."""
    known = {re.sub("[^a-z0-9]", "", key.lower()): key for key in PEAKS}
    plain = re.sub("[^a-z0-9]", "", text.lower())
    if plain not in known:
        near = " or ".join(known[n] for n in ranked(plain, known)[:3])
        raise ValueError(f"GPU={text}: no such GPU; nearest: {near}; known: {', '.join(PEAKS)}")
    return known[plain]


def banded(likely: float, factors: Sequence[float], least: float = 0.0) -> list[float]:
    """Low, likely, high of what a forecast calls likely, by factors on it; none below `least`, which is exact."""
    return [max(least, likely * factor) for factor in factors]


def peaks_file() -> Path:
    """Where the peaks that this user has measured lie, of all machines that share the home."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "ablab" / "peaks.json"


def peaks_key(name: str, driver: str | None, cap_w: float | None) -> str:
    """A device as peaks know it: another driver or power cap is another device."""
    return f"{name}, driver {driver or '-'}, cap {f'{cap_w:.0f} W' if cap_w else '-'}"


def benched(name: str, driver: str | None, cap_w: float | None) -> Gpu | None:
    """The peaks that `ablab machine bench` found for a device, None if it has not been run or its file is damaged."""
    try:
        found: dict[str, Any] = json.loads(peaks_file().read_text())[peaks_key(name, driver, cap_w)]
        return Gpu(*(float(found[field]) for field in Gpu._fields))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def inventory(run: Run | None = None, root: Path = Path("/"), env: dict[str, str] | None = None) -> Machine:
    """What this process may use.  `run`, `root` (of /proc and /sys) and `env` are arguments for tests."""
    return Machine(
        cores=cores(root),
        memory_bytes=memory(root),
        cpu=_cpu(root),
        devices=devices(run or command, root, dict(os.environ) if env is None else env),
        host=host(),
        boot_id=boot_id(),
    )


def command(argv: Sequence[str]) -> str:
    """Output of a command, '' when it is not there, fails or takes 20 s."""
    if not shutil.which(argv[0]):
        return ""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def cores(root: Path = Path("/")) -> tuple[int, ...]:
    """CPU cores of this process: its affinity, cut to the CPU quota of its container."""
    if hasattr(os, "sched_getaffinity"):
        found = sorted(os.sched_getaffinity(0))
    else:
        found = list(range(os.cpu_count() or 1))
    quota, _, period = _text(root / "sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdecimal():
        found = found[: max(1, int(quota) // int(period))]
    return tuple(found)


def memory(root: Path = Path("/")) -> int:
    """Bytes of memory of this machine or container."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _text(root / "sys/fs/cgroup/memory.max")
    return min(total, int(limit)) if limit.isdecimal() else total


def devices(run: Run, root: Path, env: dict[str, str]) -> tuple[Device, ...]:
    """GPUs that this process may use, in PCI order; no GPU is an empty tuple.

    The variables by which users hide devices are honoured.  NOTE an index in CUDA_VISIBLE_DEVICES counts in
    PCI order here, as with CUDA_DEVICE_ORDER=PCI_BUS_ID; a UUID is never ambiguous.
    """
    if (root / "proc/driver/nvidia").exists() or (root == Path("/") and shutil.which("nvidia-smi")):
        return _visible(_nvidia(run), env, "CUDA_VISIBLE_DEVICES")
    if (root / "sys/module/amdgpu").exists():
        return _visible(_sysfs(root) or _rocm_smi(run), env, "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
    return ()


def _nvidia(run: Run) -> list[Device]:
    query = "--query-gpu=uuid,name,memory.total,mig.mode.current"
    found = []
    for row in csv.reader(run(["nvidia-smi", query, "--format=csv,noheader,nounits"]).splitlines()):
        if len(row) != 4 or not row[2].strip().isdecimal():
            continue
        uuid, name, mib, mig = (cell.strip() for cell in row)
        if mig == "Enabled":
            found += _mig(run, uuid, name)
        else:
            found.append(Device(kind="cuda", name=name, uuid=uuid, memory_bytes=int(mib) << 20))
    return found


def power_cap(device: Device, run: Run = command, root: Path = Path("/")) -> float | None:
    """Watts that a GPU may draw, None where it does not say."""
    text = ""
    if device.kind == "cuda":
        text = run(["nvidia-smi", "-i", device.uuid, "--query-gpu=power.limit", "--format=csv,noheader,nounits"])
    for folder in root.glob("sys/class/drm/card[0-9]*/device"):
        if device.kind == "rocm" and f"GPU-{_text(folder / 'unique_id')}" == device.uuid:
            caps = [_text(path) for path in folder.glob("hwmon/hwmon*/power1_cap")]
            text = next((f"{int(cap) / 1e6}" for cap in caps if cap.isdecimal()), "")
    return float(text) if re.fullmatch(r"\d+(\.\d+)?\s*", text) else None


def _mig(run: Run, parent: str, name: str) -> list[Device]:
    """Slices of a GPU; once it is sliced, itself it is none."""
    _, _, listing = run(["nvidia-smi", "-L"]).partition(parent)
    listing = re.split(r"\nGPU ", listing)[0]
    slices = re.findall(r"MIG (\d+g\.(\d+)gb\S*).*UUID: (MIG-[^)\s]+)", listing)
    return [
        Device(kind="cuda", name=f"{name} MIG {profile}", uuid=uuid, memory_bytes=int(gb) << 30)
        for profile, gb, uuid in slices
    ]


def _sysfs(root: Path) -> list[Device]:
    """AMD GPUs by the kernel driver; those without a unique id cannot be leased and are left out."""
    found = []
    for folder in root.glob("sys/class/drm/card[0-9]*/device"):
        vram, unique = _text(folder / "mem_info_vram_total"), _text(folder / "unique_id")
        if _text(folder / "vendor") == "0x1002" and vram.isdecimal() and unique.strip("0"):
            name = _text(folder / "product_name") or f"AMD {_text(folder / 'device')}"
            device = Device(kind="rocm", name=name, uuid=f"GPU-{unique}", memory_bytes=int(vram))
            found.append((folder.resolve().name, device))
    return [device for _, device in sorted(found, key=lambda f: f[0])]


def _rocm_smi(run: Run) -> list[Device]:
    """AMD GPUs by the JSON of rocm-smi, whose keys changed case between ROCm 5 and 7."""
    text = run(["rocm-smi", "--showproductname", "--showuniqueid", "--showmeminfo", "vram", "--json"])
    try:
        cards = json.loads(text[text.find("{") :]) if "{" in text else {}
    except ValueError:
        return []
    found = []
    for card, facts in sorted(cards.items()):
        facts = {k.lower(): str(v) for k, v in facts.items()} if card.startswith("card") else {}
        vram, unique = facts.get("vram total memory (b)", ""), facts.get("unique id", "").removeprefix("0x")
        if vram.isdecimal() and re.fullmatch("[0-9a-f]+", unique):
            name = facts.get("card series") or facts.get("card model") or "AMD"
            found.append(Device(kind="rocm", name=name, uuid=f"GPU-{unique:>016}", memory_bytes=int(vram)))
    return found


def _visible(found: list[Device], env: dict[str, str], *variables: str) -> tuple[Device, ...]:
    """Devices that are not hidden; like the drivers, a list ends at its first entry that names none."""
    for variable in variables:
        if variable not in env:
            continue
        kept: list[Device] = []
        for item in env[variable].replace(" ", "").split(","):
            hits = [d for d in found if item and d.uuid.startswith(item)]
            if item.isdecimal():
                hits = found[int(item) : int(item) + 1]
            if len(hits) != 1:
                break
            kept += hits
        found = kept
    return tuple(found)


def _cpu(root: Path) -> str:
    match = re.search(r"^model name\s*:\s*(.+)$", _text(root / "proc/cpuinfo"), re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


@cache
def host() -> str:
    """Name of this host."""
    return socket.gethostname()


@cache
def boot_id() -> str:
    """What two processes share exactly if they see each other's pids: kernel boot and pid namespace."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return _text(Path("/proc/sys/kernel/random/boot_id")) + space.removeprefix("pid:")


def proc_start(pid: int) -> int | None:
    """Start of a process in kernel ticks since boot, None if it is gone or waits to be reaped.

    A pid is used again, (pid, start) is not.
    """
    try:
        # the name may hold blanks and brackets: split after the last one
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])
