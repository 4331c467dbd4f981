# SPDX-License-Identifier: MIT
"""How figures look: the only place with colours, sizes and markers."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

DPI = 300
BETTER, WORSE, EQUAL, NEUTRAL = "#1a7f37", "#cf222e", "#0969da", "#57606a"
BAND = "#ddf4ff"
# marker and colour say the same, so neither is needed to read the other
VERDICTS = {
    "better": (BETTER, "^"),
    "worse": (WORSE, "v"),
    "equivalent": (EQUAL, "s"),
    "open": (NEUTRAL, "o"),
}
# Okabe and Ito 2008, https://jfly.uni-koeln.de/color/: told apart by people who see fewer colours
CYCLE = ("#000000", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
HATCHES = {"better": "", "worse": "///", "equivalent": "...", "open": "xx"}
PARTS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#999999", "#000000", "#8c564b")
_RC = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.use_mathtext": False,
    "axes.formatter.useoffset": False,
    "axes.unicode_minus": False,
    "grid.color": "#d8dee4",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "text.parse_math": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "ablab",
}


@contextmanager
def style() -> Iterator[None]:
    """Our settings and nobody else's: a matplotlibrc of the user does not change a figure."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_RC)
        yield


def label(text: str, width: int = 44) -> str:
    """A user's text as one short line of characters that the font has."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    known = get_font(findfont(FontProperties(family=_RC["font.family"]))).get_charmap()
    clean = "".join(c if ord(c) in known and c.isprintable() else "?" for c in " ".join(text.split()))
    return clean if len(clean) <= width else clean[: width - 2] + ".."


def stack(ax: Any, labels: Sequence[str], parts: Mapping[str, Sequence[float]]) -> None:
    """Horizontal bars of parts, from top to bottom as given; colour and hatch tell the parts."""
    left = [0.0] * len(labels)
    for i, (name, values) in enumerate(parts.items()):
        ax.barh(range(len(labels)), values, left=left, color=PARTS[i % len(PARTS)], label=name, edgecolor="white")
        left = [a + b for a, b in zip(left, values, strict=True)]
    rows(ax, labels)


def rows(ax: Any, labels: Sequence[str]) -> None:
    """Names of rows, the first on top."""
    ax.set_yticks(range(len(labels)), [label(text, 34) for text in labels])
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)


def new(width: float, height: float, **grid: Any) -> tuple[Any, Any]:
    """A figure of this size in inches and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(**grid)
