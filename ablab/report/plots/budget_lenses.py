# SPDX-License-Identifier: MIT
"""Ranks of the arms under the registered budget and at equal time, tokens, FLOPs and memory; flips of compared arms."""

from collections.abc import Sequence
from typing import Any

from ablab.report.lens import lenses
from ablab.report.load import Loaded
from ablab.report.plots import _style
from ablab.report.plots._save import Sheet
from ablab.report.stats import Verdict

CAPTION = "Rank of each arm by lens, 1 is best; red and a cross: a compared pair changes its order. Open: mid-schedule."
NAMES = 1.6  # lenses wide is the room for names on the left
WORDS = {"train_s": "time", "tokens": "tokens", "flops": "FLOPs", "memory": "memory"}


def info(c: Loaded, verdicts: Sequence[Verdict]) -> Sheet | None:
    """None with fewer than two arms that have a result."""
    rows = []
    for lens in lenses(c):
        flipped = {text for pair in lens.flips for text in pair}
        for text, p in lens.arms.items():
            name, at = f"{text} {c.arms[text].title}".strip(), f"equal {WORDS[lens.name]}\n{lens.at:.4g} {lens.unit}"
            rows.append((name, p.n, lens.name, at, p.value, p.rank, p.registered, text in flipped, p.mid_schedule))
    columns = ("arm", "n", "budget", "at", "value", "rank", "registered rank", "flips", "mid-schedule")
    labels = (
        "lens: the largest amount that all arms reached",
        "rank (1 is best)",
        f"registered\n{c.registered['budget']}",
    )
    return Sheet(f"{c.what}: ranks under other budgets", labels, columns, tuple(rows)) if rows else None


def draw(info: Sheet) -> Any:
    """A line for each arm over the lenses; what has no value under a lens has a gap there."""
    arms = info.groups("arm")
    figure, ax = _style.new(10, 1.8 + 0.3 * max(6, len(arms)))
    ticks = [info.labels[2], *dict.fromkeys(info.column("at"))]
    for i, (arm, part) in enumerate(arms.items()):
        ranks = [part.rows[0][6], *part.column("rank")]
        color = _style.CYCLE[i % len(_style.CYCLE)]
        points = [(x, r) for x, r in enumerate(ranks) if r is not None]
        ax.plot(*zip(*points, strict=True), color=color, linestyle=_style.DASHES[i % len(_style.DASHES)], alpha=0.8)
        states = [(False, False), *zip(part.column("flips"), part.column("mid-schedule"), strict=True)]
        for x, rank in points:
            flips, mid = states[x]
            face, marker = ("white" if mid else color), "X" if flips else "o"
            edge = _style.WORSE if flips else color
            ax.plot([x], [rank], marker=marker, markersize=8, markerfacecolor=face, markeredgecolor=edge)
        ax.text(-0.15, ranks[0], f"{_style.label(arm, 30)} (n={part.rows[0][1]})", ha="right", va="center", fontsize=8)
    ax.set_xticks(range(len(ticks)), ticks)
    ax.set_xlim(-NAMES, len(ticks) - 0.7)
    ax.invert_yaxis()
    ax.yaxis.get_major_locator().set_params(integer=True)
    ax.set(xlabel=info.labels[0], ylabel=info.labels[1], title=info.title)
    return figure
