# SPDX-License-Identifier: MIT
"""`ablab machine bench`: matrix products and copies as fast as this device does them, kept for verdicts."""

import json
import math
import time
from collections.abc import Callable

import torch

from ablab import machine, provenance
from ablab.machine import Gpu
from ablab.rundir import write_bytes

LIMIT_S = 1.0  # of each measurement


def measure(device: torch.device) -> Gpu:
    """Peaks of a device: of square products in bf16 and fp32 (TF32 where there is), of a copy that counts both ways."""
    gpu = device.type == "cuda"
    size = 8192 if gpu else 1024
    rates = []
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.full((size, size), 0.5, dtype=dtype, device=device)
        out = torch.empty_like(a)
        rates.append(2 * size**3 / best_s(lambda a=a, out=out: torch.mm(a, a, out=out), device) / 1e12)
    block = torch.ones((1 << 30 if gpu else 1 << 28) // 4, device=device)  # larger than any cache
    target = torch.empty_like(block)
    copied = 2 * block.nbytes / best_s(lambda: target.copy_(block), device) / 1e9
    memory = torch.cuda.get_device_properties(device).total_memory if gpu else machine.memory()
    listed = machine.listed(torch.cuda.get_device_name(device)) if gpu else None
    return Gpu(*rates, memory / 2**30, copied, listed.watts if listed else 0.0)


def best_s(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of the calls that fit into LIMIT_S, two at least."""
    best, end, calls = math.inf, time.perf_counter() + LIMIT_S, 0
    while calls < 2 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best, calls = min(best, time.perf_counter() - start), calls + 1
    return best


def bench() -> dict[str, dict[str, float | str]]:
    """Measure the CPU and each kind of GPU that is visible, add them to the user's file and return them by key."""
    here, driver = machine.inventory(), provenance.software()["driver"]
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.set_num_threads(len(here.cores))
    found = {machine.peaks_key(f"{here.cpu}, {len(here.cores)} cores", None, None): measure(torch.device("cpu"))}
    for i in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(i)
        alike = [d for d in here.devices if d.name == name] or list(here.devices[i : i + 1])
        named, cap_w = (alike[0].name, machine.power_cap(alike[0])) if alike else (name, None)
        if (key := machine.peaks_key(named, driver, cap_w)) not in found:
            found[key] = measure(torch.device("cuda", i))
    stamp = {"at": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
    said: dict[str, dict[str, float | str]] = {k: {**gpu._asdict(), **stamp} for k, gpu in found.items()}
    place = machine.peaks_file()
    place.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(place.read_text()) if place.exists() else {}
    write_bytes(place, json.dumps({**before, **said}, indent=1).encode() + b"\n")
    return said
