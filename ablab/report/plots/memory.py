# SPDX-License-Identifier: MIT
"""Where the memory of every arm went, and what had been forecast."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from ablab.report.load import Loaded
from ablab.report.plots import _style
from ablab.report.plots._save import Sheet
from ablab.report.stats import Verdict

CAPTION = "Peak of each arm, mean over its done trials, in parts; diamond and bar: the forecast, low, likely and high."
PARTS = ("weights", "grads", "optimizer", "masks")


def info(c: Loaded, verdicts: Sequence[Verdict]) -> Sheet | None:
    """None if no trial is done."""
    rows = []
    for arm in c.arms.values():
        done = [t for t in arm.trials if t.summary]
        if not done:
            continue
        peak = fmean(t.summary["perf"]["peak_mem_bytes"] / 2**30 for t in done)
        last = [t.points(f"memory/{part}_gib")[-1:] for part in PARTS for t in done[:1]]
        parts = [value[0][1] if value else 0.0 for value in last]
        said = [f["mem_gib"] for t in done if (f := t.summary.get("forecast"))]
        forecast = [fmean(values) for values in zip(*said, strict=True)] or [None] * 3
        name = f"{arm.label} {arm.title}".strip()
        rows.append((name, len(done), *parts, max(0.0, peak - sum(parts)), peak, *forecast))
    columns = ("arm", "n", *PARTS, "the rest", "peak", "forecast low", "forecast likely", "forecast high")
    return Sheet("Peak memory and its forecast", ("peak memory (GiB)",), columns, tuple(rows)) if rows else None


def draw(info: Sheet) -> Any:
    """Stacked bars; the forecast is a marker of its own shape."""
    figure, ax = _style.new(9, 1.6 + 0.4 * len(info.rows))
    _style.stack(ax, info.column("arm"), {name: info.column(name) for name in (*PARTS, "the rest")})
    for y, (low, likely, high) in enumerate(row[-3:] for row in info.rows):
        if likely is not None:
            error = [[likely - low], [high - likely]]
            label = None if y else "forecast"
            ax.errorbar([likely], [y], xerr=error, color="black", marker="D", markersize=4, capsize=3, label=label)
    ax.set(xlabel=info.labels[0], title=info.title)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure
