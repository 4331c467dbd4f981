# SPDX-License-Identifier: MIT
"""What the devices of a trial did: busy time, memory activity, power and throttling over time; gaps stay gaps."""

from collections.abc import Sequence
from math import nan
from typing import Any

from ablab.report import gpu
from ablab.report.load import Loaded
from ablab.report.plots import _style
from ablab.report.plots._save import Sheet
from ablab.report.stats import Verdict

CAPTION = "Share of time that a kernel ran and that the memory controller was active, power, throttling (red cross)."
POINTS = 600  # of a device; more cannot be seen


def info(c: Loaded, verdicts: Sequence[Verdict]) -> Sheet | None:
    """The first done trial with readings of a device; None without one."""
    for t in c.trials:
        rows = []
        for i, found in enumerate(gpu.newest(t).values() if t.is_done else ()):
            for at, r in gpu.line(found, range(0, len(found), max(1, len(found) // POINTS))):
                throttle = " ".join(r.get("throttle") or ()) or None
                rows.append((i, at, r.get("busy_pct"), r.get("mem_busy_pct"), r.get("power_w"), throttle))
        if rows:
            labels = ("seconds since the first sample", "share of time (%)", "power (W)")
            columns = ("device", "s", "busy", "memory activity", "power", "throttle")
            return Sheet(f"Devices of {t.id}, one attempt", labels, columns, tuple(rows))
    return None


def draw(info: Sheet) -> Any:
    """A column for each device, shares above and power below."""
    devices = info.groups("device")
    figure, axes = _style.new(max(7, 4 * len(devices)), 4.8, nrows=2, ncols=len(devices), squeeze=False, sharex=True)
    for (share, power), (i, part) in zip(axes.T, devices.items(), strict=True):
        at = part.column("s")
        for n, name in enumerate(("busy", "memory activity")):
            share.plot(at, _known(part, name), color=_style.CYCLE[n + 1], label=name, linestyle=_style.DASHES[n])
        power.plot(at, _known(part, "power"), color=_style.CYCLE[0])
        bad = [(x, p) for x, p, why in zip(at, part.column("power"), part.column("throttle"), strict=True) if why and p]
        if bad:
            power.plot(*zip(*bad, strict=True), "X", color=_style.WORSE, label="throttled")
        share.set(ylim=(-3, 103), title=f"device {i}", ylabel=info.labels[1])
        power.set(xlabel=info.labels[0], ylabel=info.labels[2])
    figure.suptitle(info.title)
    named = {n: h for ax in axes.flat for h, n in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=3)
    return figure


def _known(part: Sheet, name: str) -> list[float]:
    """A column in which nan breaks the line."""
    return [nan if y is None else y for y in part.column(name)]
