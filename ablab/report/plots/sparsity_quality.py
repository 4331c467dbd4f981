# SPDX-License-Identifier: MIT
"""What sparsity costs: realised sparsity of every arm against the metric, beside the dense arms."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from ablab.report.load import Loaded
from ablab.report.plots import _style
from ablab.report.plots._save import Sheet
from ablab.report.stats import Verdict

CAPTION = "Realised sparsity and metric, mean and range over seeds; dashed: the mean of the dense arms."
DENSE = 1e-3  # below this an arm counts as dense


def info(c: Loaded, verdicts: Sequence[Verdict]) -> Sheet | None:
    """None if no arm is sparse."""
    rows = []
    for arm in c.arms.values():
        found = [(t.value("sparsity"), t.value(c.key, c.mode)) for t in arm.trials]
        both = [pair for pair in found if None not in pair]
        if both:
            x, ys = fmean(x for x, _ in both), [y for _, y in both]
            rows.append((f"{arm.label} {arm.title}".strip(), len(ys), x, fmean(ys), min(ys), max(ys)))
    if not any(row[2] > DENSE for row in rows):
        return None
    labels = ("sparsity of the prunable weights (0..1)", f"{c.key} ({c.metric.unit})", c.metric.better or "")
    return Sheet(
        f"{c.what} against realised sparsity", labels, ("arm", "n", "sparsity", "mean", "low", "high"), tuple(rows)
    )


def draw(info: Sheet) -> Any:
    """A point for each sparse arm, green and up if it is better than the dense line, red and down if worse."""
    figure, ax = _style.new(8, 4.5)
    dense = [row[3] for row in info.rows if row[2] <= DENSE]
    line = fmean(dense) if dense else None
    if line is not None:
        ax.axhline(line, color=_style.NEUTRAL, linestyle="--", label=f"dense, {len(dense)} arms")
    for arm, n, x, y, low, high in info.rows:
        sign = 0 if line is None or not info.labels[2] else (y - line) * (-1 if info.labels[2] == "lower" else 1)
        color, marker = _style.VERDICTS["better" if sign > 0 else "worse" if sign < 0 and x > DENSE else "open"]
        ax.errorbar([x], [y], [[y - low], [high - y]], color=color, marker=marker, capsize=3, linestyle="none")
        ax.annotate(f"{_style.label(arm, 26)} (n={n})", (x, y), (6, 4), textcoords="offset points", fontsize=7)
    ax.set(xlabel=info.labels[0], ylabel=info.labels[1], title=info.title)
    ax.margins(x=0.2)
    if line is not None:
        ax.legend()
    return figure
