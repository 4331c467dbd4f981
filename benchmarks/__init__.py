# SPDX-License-Identifier: MIT
"""Measuring: candidates alternate in one process, disturbed samples are marked, all are kept."""

import datetime
import json
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
DIRTY_CORES = 0.12  # a sample is dirty when other processes used more than this meanwhile
MIN_SAMPLE_S = 0.2  # /proc/stat counts in 10 ms


@dataclass(frozen=True, slots=True)
class Sample:
    """One timing of one candidate."""

    s: float
    """Seconds per call."""
    others: float
    """Cores that other processes used meanwhile; 0 on the process clock, which they do not disturb."""

    @property
    def clean(self) -> bool:
        return self.others <= DIRTY_CORES


@dataclass(slots=True)
class Figure:
    """One row of the report: a number, and its target if it has one."""

    row: str
    value: float
    unit: str
    target: str = ""
    """Such as `>= 1.10` or `<= 3`; empty for a number that is only shown."""
    detail: str = ""
    dirty: bool = False
    """True if too few clean samples came together, so that disturbed ones had to be used."""
    samples: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """`ok`, `short`, `dirty` where nobody can tell, or nothing where there is no target."""
        if not self.target or self.dirty:
            return "dirty" if self.target else ""
        op, bound = self.target.split()
        met = self.value >= float(bound) if op == ">=" else self.value <= float(bound)
        return "ok" if met else "short"

    def line(self) -> str:
        return f"{self.row:<34} {self.value:>10.4g} {self.unit:<8} {self.target:<8} {self.verdict:<6}{self.detail}"


class Load:
    """CPU time of the machine and of this process, to tell what others used in between."""

    def __init__(self) -> None:
        self._tick = os.sysconf("SC_CLK_TCK")
        self._last = self._read()

    def _read(self) -> tuple[float, float, float]:
        own = os.times()
        busy = 0.0
        if Path("/proc/stat").exists():
            user, nice, system, _, _, irq, softirq, steal = Path("/proc/stat").read_text().split()[1:9]
            busy = sum(map(int, (user, nice, system, irq, softirq, steal))) / self._tick
        return time.perf_counter(), busy, sum(own[:4])

    def others(self) -> float:
        """Cores used by others since the last call."""
        (t0, busy0, own0), (t1, busy1, own1) = self._last, self._read()
        self._last = t1, busy1, own1
        return max(0.0, (busy1 - busy0) - (own1 - own0)) / (t1 - t0)


def alternate(
    candidates: Mapping[str, Callable[[], object]], rounds: int, threads: int, limit_s: float = 120.0
) -> dict[str, list[Sample]]:
    """Samples of every candidate, taken A B A B ..: `rounds` clean ones of each, or what `limit_s` allows.

    One thread is measured in process CPU time, more in wall time.
    """
    clock = time.process_time if threads == 1 else time.perf_counter
    calls = {}
    for name, call in candidates.items():
        call()  # warm-up
        start = time.perf_counter()
        call()
        calls[name] = max(1, round(MIN_SAMPLE_S / max(time.perf_counter() - start, 1e-7)))
    samples: dict[str, list[Sample]] = {name: [] for name in candidates}
    end = time.perf_counter() + limit_s
    while min(sum(s.clean for s in found) for found in samples.values()) < rounds:
        for name, call in candidates.items():
            load, start = Load(), clock()
            for _ in range(calls[name]):
                call()
            spent = (clock() - start) / calls[name]
            samples[name].append(Sample(spent, 0.0 if threads == 1 else load.others()))
        if time.perf_counter() > end:
            break
    return samples


def median(samples: list[Sample]) -> float:
    """Median seconds of the clean samples, of all if fewer than two are clean."""
    clean = [s.s for s in samples if s.clean]
    return statistics.median(clean if len(clean) >= 2 else [s.s for s in samples])


def is_dirty(samples: Mapping[str, list[Sample]]) -> bool:
    return any(sum(s.clean for s in found) < 2 for found in samples.values())


def versus(
    row: str, samples: Mapping[str, list[Sample]], ours: str, peer: str, target: str, detail: str = ""
) -> Figure:
    """How many times faster `ours` is than `peer`; `detail` comes after the two medians."""
    pair = {name: samples[name] for name in (ours, peer)}
    text = f"{ours} {median(pair[ours]) * 1e3:.3g} ms, {peer} {median(pair[peer]) * 1e3:.3g} ms{detail}"
    kept = {name: [asdict(s) for s in found] for name, found in pair.items()}
    return Figure(row, median(pair[peer]) / median(pair[ours]), "x", target, text, is_dirty(pair), kept)


def record(figures: list[Figure], settings: dict[str, Any], name: str, path: Path | None = None) -> Path:
    """Write one JSON with machine, versions, commit and all samples; returns its path."""
    # here, not above: kconfiglib may come from a wheel that gpu.py has yet to find
    from ablab import kconf, machine, provenance

    here = machine.inventory()
    today = datetime.date.today().isoformat()
    if path is None:
        slug = re.sub(r"[^a-z0-9]+", "-", f"{name} {here.cpu} {len(here.cores)}".lower()).strip("-")
        path = RESULTS / f"{today}-{slug}.json"
    content = {
        "schema": "ablab.bench/1",
        "date": today,
        "machine": {
            "cpu": here.cpu,
            "cores": len(here.cores),
            "memory_bytes": here.memory_bytes,
            "devices": [d.name for d in here.devices],
        },
        "software": provenance.software(),
        "code": {k: v for k, v in provenance.code(kconf.ROOT).items() if k != "patch"},
        "settings": settings,
        "figures": [asdict(f) | {"verdict": f.verdict} for f in figures],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    return path
