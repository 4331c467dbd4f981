# SPDX-License-Identifier: MIT
"""The first registered contrast as bars: the metric of both arms, a dot for each seed, and the verdict."""

from collections.abc import Sequence
from typing import Any

from ablab.report.load import Loaded
from ablab.report.plots import _style
from ablab.report.plots._save import Sheet
from ablab.report.stats import Verdict

CAPTION = "The first registered contrast: mean of each arm, a dot for each seed; colour and hatch tell the verdict."
ROOM = 1.6  # the axis starts this many ranges below the lowest value: bars are read against each other, not against 0


def info(c: Loaded, verdicts: Sequence[Verdict]) -> Sheet | None:
    """None if no registered contrast has values in both arms."""
    for (left, right, registered), v in zip(c.pairs(), verdicts, strict=True):
        if registered and v.effect is not None:
            kind = next((k for k in ("better", "worse", "equivalent") if v.word.startswith(k)), "open")
            rows = [
                (arm.label, arm.title, side, t.id, t.seed, value)
                for side, arm in (("baseline", right), (kind, left))
                for t in arm.trials
                if (value := t.value(c.key, c.mode)) is not None
            ]
            low, high, level = v.interval or (None, None, None)
            span = "" if low is None else f", {level:.1%} interval {low:+.3g} .. {high:+.3g}"
            text = f"{v.contrast.label}: {v.effect:+.4g}{span}, n={v.n}, {v.word}"
            labels = (f"{c.key} ({c.metric.unit}); the axis does not start at 0", text)
            return Sheet(c.what, labels, ("arm", "title", "kind", "trial", "seed", "value"), tuple(rows))
    return None


def draw(info: Sheet) -> Any:
    """Two bars; their common range, not 0, sets the axis, which its name says."""
    figure, ax = _style.new(6.5, 4.5)
    values = info.column("value")
    room = (max(values) - min(values)) or abs(max(values)) * 0.01 or 1.0
    start = min(values) - ROOM * room
    names = []
    for x, part in enumerate(info.groups("arm").values()):
        label, title, kind = part.rows[0][:3]
        color, hatch = (_style.VERDICTS[kind][0], _style.HATCHES[kind]) if kind != "baseline" else (_style.NEUTRAL, "")
        mean = sum(part.column("value")) / len(part.rows)
        ax.bar([x], [mean - start], bottom=start, width=0.6, color=color, hatch=hatch, alpha=0.55, edgecolor=color)
        ax.plot([x] * len(part.rows), part.column("value"), "o", color="black", markersize=4, alpha=0.7)
        ax.text(x, start + 0.15 * room, f"{mean:.5g}", ha="center", fontsize=9, fontweight="bold", color="black")
        names.append(f"{_style.label(f'{label} {title}', 34)}\nn={len(part.rows)}")
    ax.set_xticks(range(len(names)), names)
    ax.set_ylim(start, max(values) + 0.5 * room)
    ax.set_ylabel(info.labels[0])
    ax.set_title(f"{info.title}\n{_style.label(info.labels[1], 100)}", fontsize=9)
    ax.grid(axis="x", visible=False)
    return figure
