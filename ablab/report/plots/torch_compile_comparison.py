# SPDX-License-Identifier: MIT
"""torch.compile off and on side by side: memory activity, busy time, tokens a second."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from ablab.report.load import Loaded
from ablab.report.plots import _compile, _style
from ablab.report.plots._save import Sheet
from ablab.report.stats import Verdict

CAPTION = "Off and on side by side, mean and range over seeds. Activity of the memory controller is not memory saved."
LONG = 1000  # from here on a number is shown without decimals
SHOWN = ("gpu/memory_util_avg", "gpu/compute_util_avg", "train/tok_per_sec")


def info(c: Loaded, verdicts: Sequence[Verdict]) -> Sheet | None:
    """Measures that were taken.  Raises NotComparableError for arms that differ in more than compilation."""
    rows = []
    for pair in _compile.pairs(c):
        for name in SHOWN:
            for status, arm in (("off", pair.off), ("on", pair.on)):
                if got := [*_compile.values(arm, name).values()]:
                    rows.append(
                        (_compile.MEASURES[name][0], pair.label, status, len(got), fmean(got), min(got), max(got))
                    )
    columns = ("measure", "arm", "compile", "n", "mean", "low", "high")
    return Sheet("torch.compile off and on", ("arm",), columns, tuple(rows)) if rows else None


def draw(info: Sheet) -> Any:
    """A panel for each measure; on has a hatch."""
    panels = info.groups("measure")
    figure, axes = _style.new(4.2 * len(panels) + 1, 4, ncols=len(panels), squeeze=False)
    for ax, (measure, part) in zip(axes[0], panels.items(), strict=True):
        arms = list(part.groups("arm"))
        for arm, _, n, mean, low, high, status in [(r[1], 0, *r[3:], r[2]) for r in part.rows]:
            x, is_on = arms.index(arm), status == "on"
            style = {"color": _style.CYCLE[1 + is_on], "hatch": "//" if is_on else "", "edgecolor": "white"}
            label = status if x == 0 else None
            at = x + (0.2 if is_on else -0.2)
            ax.bar([at], [mean], width=0.38, yerr=[[mean - low], [high - mean]], capsize=3, label=label, **style)
            text = f"{mean:,.0f}" if mean >= LONG else f"{mean:.4g}"
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
            ax.text(at, mean / 2, f"{text}\nn={n}", ha="center", va="center", fontsize=7, bbox=box)
        ax.set_xticks(range(len(arms)), [_style.label(a, 24) for a in arms])
        ax.set_ylabel(measure)
        ax.margins(y=0.2)
        ax.grid(axis="x", visible=False)
    figure.suptitle(info.title)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, title="compile")
    return figure
