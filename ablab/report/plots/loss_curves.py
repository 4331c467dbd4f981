# SPDX-License-Identifier: MIT
"""Learning curves: median and min-max band over seeds for every arm."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from ablab.report.load import Arm, Loaded
from ablab.report.plots import _style
from ablab.report.stats import Verdict
from ablab.report.table import Table, merge

CAPTION = (
    "Median and min-max band over the seeds of each arm, at the points that all have."
    " The vertical range leaves out the first tenth of the axis."
)
TOGETHER = 4  # more curves than this in one panel cannot be told apart
COLUMNS = 3
MOST = 48  # arms that a picture shows: more make it longer than anyone scrolls, and a minute to draw
NAME = 30  # characters
FIRST = 0.1  # the vertical range leaves out what lies before this part of the axis, where all curves fall steeply
LAST = 0.5  # part of the axis that the second panel shows


@dataclass(frozen=True, slots=True)
class Curve:
    """One arm; the four lists have one entry for each point that all its seeds have."""

    arm: str
    n: int
    x: tuple[float, ...]
    median: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Info:
    """All curves of one metric."""

    title: str
    x_label: str
    y_label: str
    curves: tuple[Curve, ...]

    def table(self) -> Table:
        rows = [(c.arm, c.n, *point) for c in self.curves for point in zip(c.x, c.median, c.low, c.high, strict=True)]
        return merge(("arm", "n", "x", "median", "low", "high"), rows)


def info(c: Loaded, verdicts: Sequence[Verdict]) -> Info | None:
    """The curves of the registered metric, over tokens if they are the budget, else over steps."""
    axis = {"tokens": ("tokens", "training tokens")}.get(c.registered["budget"], ("step", "optimizer steps"))
    done = [a for a in c.arms.values() if any(t.is_done for t in a.trials)]
    arms = [(_arm(a), [t.points(c.key, axis[0]) for t in a.trials if t.is_done]) for a in done[:MOST]]
    title = f"{c.key}: median and range over seeds"
    title += f", the first {MOST} of {len(done)} arms" if len(done) > MOST else ""
    found = arrange(title, axis[1], f"{c.key} ({c.metric.unit})", arms)
    return found if found.curves else None


def _arm(a: Arm) -> str:
    """Its name; in a matrix, where that is too long for a panel, the values of the axes alone."""
    name, short = f"{a.label} {a.title}".strip(), " ".join([a.step or "", *map(str, a.axes.values())]).strip()
    return short if a.axes and len(name) > NAME else name


def arrange(
    title: str,
    x_label: str,
    y_label: str,
    arms: Sequence[tuple[str, Sequence[Sequence[tuple[float, float]]]]],
) -> Info:
    """`arms` are a name and, for each seed, the points (x, value); an arm without a point has no curve."""
    curves = []
    for arm, seeds in arms:
        by_seed = [dict(points) for points in seeds if points]
        shared = sorted(set.intersection(*(set(s) for s in by_seed))) if by_seed else []
        if shared:
            values = [[s[x] for s in by_seed] for x in shared]
            bands = [tuple(float(f(v)) for v in values) for f in (median, min, max)]
            curves.append(Curve(arm, len(by_seed), tuple(map(float, shared)), *bands))
    return Info(title, x_label, y_label, tuple(curves))


def draw(info: Info) -> Any:
    """One panel with all curves, one with their second half; many arms get a panel each, with the first."""
    if len(info.curves) <= TOGETHER:
        figure, axes = _style.new(9, 4, ncols=2)
        for ax, part in zip(axes, (0.0, LAST), strict=True):
            for number, curve in enumerate(info.curves):
                _curve(ax, curve, number)
            ax.set(xlabel=info.x_label, ylabel=info.y_label, **_limits(info, part))
        axes[0].set_title(info.title)
        axes[1].set_title(f"the last {1 - LAST:.0%}")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=COLUMNS)
        return figure
    first, others = info.curves[0], info.curves[1:]
    rows = math.ceil(len(others) / COLUMNS)
    figure, grid = _style.new(9, 0.6 + 1.9 * rows, nrows=rows, ncols=COLUMNS, sharex=True, sharey=True, squeeze=False)
    for ax, curve in zip(grid.flat, others, strict=False):
        _curve(ax, first, 0)
        _curve(ax, curve, 1)
        ax.set_title(_name(curve), fontsize=8)
    grid[0, 0].set(**_limits(info, LAST))  # which all share
    for ax in list(grid.flat)[len(others) :]:
        ax.set_axis_off()
    figure.suptitle(f"{info.title}, the last {1 - LAST:.0%}; black: {_name(first)}")
    figure.supxlabel(info.x_label)
    figure.supylabel(info.y_label)
    return figure


def _curve(ax: Any, curve: Curve, number: int) -> None:
    color, dash = _style.CYCLE[number], _style.DASHES[number]
    marker = "." if len(curve.x) == 1 else None
    ax.plot(curve.x, curve.median, color=color, linestyle=dash, marker=marker, label=_name(curve))
    if curve.n > 1:
        ax.fill_between(curve.x, curve.low, curve.high, color=color, alpha=0.15, linewidth=0)


def _name(curve: Curve) -> str:
    return f"{_style.label(curve.arm, NAME)} (n={curve.n})"


def _limits(info: Info, part: float) -> dict[str, Any]:
    """Ranges that show the curves from `part` of the axis on."""
    end = max(c.x[-1] for c in info.curves)
    start = max(part, FIRST) * end
    seen = [v for c in info.curves for x, *values in zip(c.x, c.low, c.high, strict=True) if x >= start for v in values]
    room = 0.05 * ((max(seen) - min(seen)) or abs(max(seen)) or 1.0)
    return {"ylim": (min(seen) - room, max(seen) + room), "xlim": (part * end, end if end > 0 else 1.0)}
