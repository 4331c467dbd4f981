# SPDX-License-Identifier: MIT
"""Readings of the devices of a trial, from its telemetry rows."""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from ablab import rundir
from ablab.report.load import Trial

GAP = 2.5  # periods without a sample after which nothing is known


def samples(t: Trial) -> dict[str, list[tuple[float, Mapping[str, Any]]]]:
    """Device -> (seconds since the first sample, reading) of the newest attempt."""
    found: dict[str, list[tuple[float, Mapping[str, Any]]]] = {}
    start = None
    for row in rundir.lines(t.dir.attempt(t.attempt).telemetry, "telemetry") if t.attempt else ():
        for device, reading in row.get("devices", {}).items():
            start = row["t"] if start is None else start
            found.setdefault(device, []).append((row["t"] - start, reading))
    return found


def mean(t: Trial, name: str) -> float | None:
    """Mean of a reading over all samples and devices, None where it was never taken."""
    values = [r[name] for readings in samples(t).values() for _, r in readings if r.get(name) is not None]
    return fmean(values) if values else None
