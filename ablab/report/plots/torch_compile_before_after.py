# SPDX-License-Identifier: MIT
"""What compiling changed: the measured ratio of on to off, with its exact interval."""

import math
from collections.abc import Sequence
from typing import Any

from ablab.report import stats
from ablab.report.load import Loaded
from ablab.report.plots import _compile, _style
from ablab.report.plots._save import Sheet
from ablab.report.stats import Verdict

CAPTION = "On over off, geometric mean over paired seeds, exact interval; green is better, red and hatched worse."
SHOWN = ("train/tok_per_sec", "step_ms_p50", "peak_gib", "gpu/memory_util_avg")


def info(c: Loaded, verdicts: Sequence[Verdict]) -> Sheet | None:
    """Raises NotComparableError for arms that differ in more than compilation."""
    rows = []
    for pair in _compile.pairs(c):
        for name in SHOWN:
            off, on = (_compile.values(arm, name) for arm in (pair.off, pair.on))
            shared = sorted(s for s in off.keys() & on.keys() if off[s] > 0 and on[s] > 0)
            if not shared:
                continue
            words, better, _ = _compile.MEASURES[name]
            exact = stats.paired([math.log(on[s] / off[s]) for s in shared])
            low, high, level = exact.interval(c.registered["alpha"]) or (None, None, None)
            ends = [None if end is None else math.exp(end) for end in (low, high)]
            gain = (exact.effect > 0) == (better == "higher")
            kind = "equivalent" if not exact.effect else "open" if better is None else "better" if gain else "worse"
            word = "no difference" if not exact.effect else "" if better is None else kind
            rows.append((pair.label, words, len(shared), math.exp(exact.effect), *ends, level, kind, word))
    columns = ("arm", "measure", "n", "ratio", "low", "high", "level", "kind", "word")
    return Sheet("torch.compile: on over off", ("ratio on / off",), columns, tuple(rows)) if rows else None


def draw(info: Sheet) -> Any:
    """Bars from 1; the colour says which side is better, the hatch says it again."""
    figure, ax = _style.new(9, 1.5 + 0.42 * len(info.rows))
    ax.axvline(1, color=_style.NEUTRAL, linewidth=1)
    for y, (_, _, n, ratio, low, high, level, kind, word) in enumerate(info.rows):
        color, hatch = _style.VERDICTS[kind][0], _style.HATCHES[kind]
        ax.barh([y], [ratio - 1], left=1, height=0.6, color=color, hatch=hatch, alpha=0.6, edgecolor=color)
        if low is not None:
            ax.plot([low, high], [y, y], color="black", marker="|", linewidth=1.2)
        span = "" if low is None else f" [{low:.3g}, {high:.3g}] {level:.1%}"
        text = f"{ratio:.3f}{span}  n={n}  {word}"
        ax.annotate(
            text, (max(ratio, high or ratio, 1), y), (6, 0), textcoords="offset points", va="center", fontsize=7.5
        )
    _style.rows(ax, [f"{measure}, {arm}" for arm, measure, *_ in info.rows])
    ax.set(xlabel=info.labels[0], title=info.title)
    ax.margins(x=0.6)
    return figure
