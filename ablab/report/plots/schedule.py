# SPDX-License-Identifier: MIT
"""What was applied over a run: the learning rate, and sparsity beside what its schedule asked for."""

from collections.abc import Sequence
from typing import Any

from ablab.report.load import Loaded
from ablab.report.plots import _style
from ablab.report.plots._save import Sheet
from ablab.report.stats import Verdict

CAPTION = "Rate that the optimizer applied, and realised sparsity with its formula (dotted), of each arm's first trial."
APPLIED = {"learning_rate": "learning rate", "sparsity": "sparsity of the prunable weights (0..1)"}
FORMULA = {"sparsity": "sparsity/target"}
ARMS = 14  # more cannot be told apart


def info(c: Loaded, verdicts: Sequence[Verdict]) -> Sheet | None:
    """None if no done trial has rates."""
    rows = []
    for arm in list(c.arms.values())[:ARMS]:
        t = next((t for t in arm.trials if t.is_done), None)
        for key in APPLIED if t else ():
            formula = dict(t.points(FORMULA[key])) if key in FORMULA else {}
            points = t.points(key)
            if key not in FORMULA or any(v > 0 for _, v in points):
                rows += [(key, f"{arm.label} {arm.title}".strip(), t.id, x, y, formula.get(x)) for x, y in points]
    columns = ("quantity", "arm", "trial", "step", "applied", "formula")
    return Sheet("What was applied", ("optimizer steps", *APPLIED.values()), columns, tuple(rows)) if rows else None


def draw(info: Sheet) -> Any:
    """A panel for each quantity that was recorded."""
    panels = info.groups("quantity")
    figure, axes = _style.new(9, 0.6 + 3 * len(panels), nrows=len(panels), squeeze=False, sharex=True)
    for ax, (key, part) in zip(axes[:, 0], panels.items(), strict=True):
        for i, (arm, curve) in enumerate(part.groups("arm").items()):
            color, dash = _style.CYCLE[i % len(_style.CYCLE)], _style.DASHES[i % len(_style.DASHES)]
            x, formula = curve.column("step"), curve.column("formula")
            ax.plot(x, curve.column("applied"), color=color, linestyle=dash, label=_style.label(arm, 30))
            if None not in formula:
                ax.plot(x, formula, color=color, linestyle=":", linewidth=2.4, alpha=0.6)
        ax.set_ylabel(APPLIED[key])
    axes[-1, 0].set_xlabel(info.labels[0])
    figure.suptitle(info.title)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure
