# SPDX-License-Identifier: MIT
"""Every contrast in study order: difference, exact interval, margin band, n and verdict word."""

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import Any

from ablab.report.load import Loaded
from ablab.report.plots import _style
from ablab.report.stats import Verdict
from ablab.report.table import Table, merge, shown

CAPTION = "Difference and exact interval of each contrast; marker and colour tell the verdict."
WIDTH, HEIGHT, ROW = 11.0, 1.4, 0.28  # inches
MOST = 100  # contrasts that a picture shows, registered ones first; report.html has all
HEADING = -1.0  # the row above the first
LABEL = 44  # characters of a line
TABS = (*((x, "right") for x in (0.15, 0.34, 0.53, 0.64, 0.7)), (0.74, "left"))


@dataclass(frozen=True, slots=True)
class Row:
    """One contrast."""

    label: str
    kind: str
    """A key of _style.VERDICTS."""
    effect: float | None
    low: float | None
    high: float | None
    level: float | None
    n: int
    word: str


@dataclass(frozen=True, slots=True)
class Info:
    """All contrasts of one metric."""

    title: str
    x_label: str
    margin: float | None
    rows: tuple[Row, ...]

    def table(self) -> Table:
        rows = [(r.label, r.effect, r.low, r.high, r.level, r.n, r.word) for r in self.rows]
        return merge(("contrast", "effect", "low", "high", "level", "n", "word"), rows)


def info(c: Loaded, verdicts: Sequence[Verdict]) -> Info | None:
    """The verdicts of a campaign, None without a single effect."""
    if all(v.effect is None for v in verdicts):
        return None
    title = f"{c.what}: left minus right"
    if (left := len(verdicts) - MOST) > 0:
        first = sorted(range(len(verdicts)), key=lambda i: not verdicts[i].contrast.registered)[:MOST]
        verdicts, title = [verdicts[i] for i in sorted(first)], f"{title}; {left} further contrasts: report.html"
    return arrange(title, f"difference of {c.key} ({c.metric.unit})", c.registered["margin"], verdicts)


def arrange(title: str, x_label: str, margin: float | None, verdicts: Sequence[Verdict]) -> Info:
    """The figure of a list of verdicts."""
    rows = []
    for v in verdicts:
        low, high, level = v.interval or (None, None, None)
        kind = next((k for k in ("better", "worse", "equivalent") if v.word.startswith(k)), "open")
        rows.append(
            Row(
                f"{v.contrast.label}  {v.contrast.title}".strip(),
                kind,
                v.effect,
                low,
                high,
                level,
                v.n,
                v.word,
            )
        )
    return Info(title, x_label, margin, tuple(rows))


def draw(info: Info) -> Any:
    """Rows from top to bottom, the numbers in columns beside them; a single pair has a point and no bar."""
    figure, (ax, side) = _style.new(WIDTH, HEIGHT + ROW * len(info.rows), ncols=2, sharey=True)
    ax.axvline(0, color=_style.NEUTRAL, linewidth=0.8)
    if info.margin:
        ax.axvspan(-info.margin, info.margin, color=_style.BAND, zorder=0, label=f"margin {info.margin:g}")
    for y, row in enumerate(info.rows):
        color, marker = _style.VERDICTS[row.kind]
        if row.low is not None and row.high is not None:
            ax.plot([row.low, row.high], [y, y], color=color, solid_capstyle="butt")
        if row.effect is not None:
            ax.plot([row.effect], [y], marker=marker, color=color, markersize=6, linestyle="none")
        cells = (
            shown(row.effect, "+.3g"),
            shown(row.low, "+.3g"),
            shown(row.high, "+.3g"),
            shown(row.level, ".1%"),
        )
        _line(side, y, (*cells, str(row.n), row.word))
    _line(side, HEADING, ("difference", "low", "high", "level", "n", "verdict"), fontweight="bold")
    side.set_axis_off()
    ax.set_yticks(range(len(info.rows)), [fill(_style.label(r.label, 2 * LABEL), LABEL) for r in info.rows])
    for text in ax.get_yticklabels():  # two small lines fit into a row
        text.set_fontsize(7 if "\n" in text.get_text() else 9)
    ax.set_ylim(len(info.rows) - 0.4, HEADING - 0.4)
    ax.margins(x=0.08)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel(info.x_label)
    figure.suptitle(info.title)
    for kind in dict.fromkeys(r.kind for r in info.rows if r.effect is not None):
        color, marker = _style.VERDICTS[kind]
        name = "no verdict" if kind == "open" else kind
        ax.plot([], [], color=color, marker=marker, linestyle="none", label=name)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=len(_style.VERDICTS) + 1)
    return figure


def _line(side: Any, y: float, cells: Sequence[str], **style: Any) -> None:
    for (x, align), text in zip(TABS, cells, strict=True):
        side.text(x, y, text, ha=align, va="center", fontsize=7.5, **style)
