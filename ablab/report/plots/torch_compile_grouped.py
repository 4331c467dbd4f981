# SPDX-License-Identifier: MIT
"""All arms by the compile status that their trials recorded: tokens a second of each trial."""

from collections.abc import Sequence
from typing import Any

from ablab.report.load import Loaded
from ablab.report.plots import _compile, _style
from ablab.report.plots._save import Sheet
from ablab.report.stats import Verdict

CAPTION = "Every done trial by the compile status that it recorded; a dot is a trial."
NAME = "train/tok_per_sec"


def info(c: Loaded, verdicts: Sequence[Verdict]) -> Sheet | None:
    """Raises NotComparableError for arms that differ in more than compilation."""
    _compile.pairs(c)
    rows = [
        (_compile.status(arm), arm.label, t.id, t.seed, value)
        for arm in c.arms.values()
        for t in arm.trials
        if t.summary and (value := _compile.MEASURES[NAME][2](t)) is not None
    ]
    labels = ("compile status", _compile.MEASURES[NAME][0])
    columns = ("compile", "arm", "trial", "seed", "value")
    return Sheet("All arms by compile status", labels, columns, tuple(sorted(rows, key=lambda r: str(r[0]))))


def draw(info: Sheet) -> Any:
    """A column for each status, a colour and a marker for each arm."""
    figure, ax = _style.new(7, 4.2)
    arms, statuses = list(dict.fromkeys(info.column("arm"))), list(info.groups("compile"))
    for i, arm in enumerate(arms):
        part = info.groups("arm")[arm]
        x = [statuses.index(s) + 0.5 * ((i + 0.5) / len(arms) - 0.5) for s in part.column("compile")]
        style = {"color": _style.CYCLE[i % len(_style.CYCLE)], "marker": "os^vDXP"[i % 7], "linestyle": "none"}
        ax.plot(x, part.column("value"), label=f"{_style.label(arm, 30)} (n={len(x)})", **style)
    ax.set_xticks(range(len(statuses)), [str(s) for s in statuses])
    ax.set_xlim(-0.5, len(statuses) - 0.5)
    ax.set_ylim(0, 1.1 * max(info.column("value")))
    ax.set(xlabel=info.labels[0], ylabel=info.labels[1], title=info.title)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure
