# SPDX-License-Identifier: MIT
"""How fast every arm was, how even its steps were, and what the time went to."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from ablab.report.load import Loaded
from ablab.report.plots import _style
from ablab.report.plots._save import Sheet
from ablab.report.stats import Verdict

CAPTION = "Tokens a second, mean and range over seeds; median and 95th percentile of a step; share of the wall time."
PARTS = ("startup", "compile", "warmup", "data", "eval", "checkpoint", "other")


def info(c: Loaded, verdicts: Sequence[Verdict]) -> Sheet | None:
    """None if no trial is done."""
    rows = []
    for arm in c.arms.values():
        done = [t.summary for t in arm.trials if t.summary]
        if done:
            speed = [s["perf"]["tok_per_s"] for s in done]
            steps = [fmean(s["perf"][f"step_ms_{p}"] for s in done) for p in ("p50", "p95")]
            parts = [fmean(s["used"][f"{part}_s"] / s["used"]["total_s"] for s in done) for part in PARTS]
            row = (f"{arm.label} {arm.title}".strip(), len(done), fmean(speed), min(speed), max(speed), *steps)
            rows.append((*row, max(0.0, 1 - sum(parts)), *parts))
    columns = ("arm", "n", "tok/s", "low", "high", "p50", "p95", "train", *PARTS)
    labels = ("tokens/s of training", "ms of a step, median (dot) to p95 (bar)", "share of the wall time")
    return Sheet("Throughput", labels, columns, tuple(rows)) if rows else None


def draw(info: Sheet) -> Any:
    """Three panels with the same rows."""
    figure, (speed, steps, parts) = _style.new(12, 1.7 + 0.4 * len(info.rows), ncols=3, sharey=True)
    arms = info.column("arm")
    for y, row in enumerate(info.rows):
        _, n, mean, low, high, p50, p95 = row[:7]
        speed.barh([y], [mean], color=_style.CYCLE[1], xerr=[[mean - low], [high - mean]], capsize=3)
        speed.text(0, y, f" n={n}", va="center", fontsize=7, color="white")
        steps.plot([p50, p95], [y, y], color=_style.CYCLE[5])
        steps.plot([p50], [y], color=_style.CYCLE[5], marker="o")
        steps.plot([p95], [y], color=_style.CYCLE[5], marker="|", markersize=10)
    steps.set_xlim(left=0)
    _style.stack(parts, arms, {name: info.column(name) for name in ("train", *PARTS)})
    _style.rows(speed, arms)
    for ax, label in zip((speed, steps, parts), info.labels, strict=True):
        ax.set_xlabel(label)
    figure.suptitle(info.title)
    figure.legend(*parts.get_legend_handles_labels(), loc="outside lower center", ncols=8)
    return figure
