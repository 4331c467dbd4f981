# SPDX-License-Identifier: MIT
"""Pages that load nothing: the document with its policy, and the blocks that page.js draws.

A page is safe against its content: a policy that allows the hashes of our script and style alone, data in
application/json blocks, and a script that only ever sets text.
"""

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cache, reduce
from pathlib import Path
from typing import Any

import numpy as np

from ablab import metrics
from ablab.report.index import Columns
from ablab.report.table import Table, line

POINTS = 400  # of a curve at most
AXES = {
    "step": "optimizer steps",
    "tokens": "training tokens",
    "train_s": "seconds of training",
    "wall_s": "seconds in all",
    "flops": "FLOPs of the model",
}
Model = dict[str, Any]


@cache
def assets() -> tuple[str, str]:
    """Script and style."""
    script, style = ((Path(__file__).parent / f"page.{kind}").read_text() for kind in ("js", "css"))
    return script, style


@cache
def policy(live: bool = False) -> str:
    """The content security policy of every page; a live one may ask its own server."""
    script, style = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in assets())
    parts = [f"default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; img-src data:"]
    parts += ["base-uri 'none'; form-action 'none'", *(["connect-src 'self'"] if live else [])]
    return "; ".join(parts)


def document(title: str, model: Model, mark: str = "", live: bool = False) -> str:
    """A whole page.  The title is escaped here, everything else is inside the JSON block."""
    script, style = assets()
    text = json.dumps(model, separators=(",", ":"), allow_nan=False)  # ASCII, so U+2028 is escaped as well
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    name = line(title).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy(live)}">\n{mark}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n'
        f"<title>{name}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        "<noscript><p>This page needs JavaScript; report.md beside it has the same content.</p></noscript>\n"
        f'<script type="application/json" id="data">{text}</script>\n<script>{script}</script>\n</body>\n</html>\n'
    )


def table(found: Table, **options: Any) -> Model:
    """A table as a block."""
    columns = [{"name": n, "format": found.formats[n]} if n in found.formats else {"name": n} for n in found.columns]
    rows = [[line(cell) if isinstance(cell, str) else cell for cell in row] for row in found.rows]
    return {"type": "table", "columns": columns, "rows": rows, **options}


def section(title: str, *blocks: Model | None) -> Model:
    """A section; None is a block that there is nothing to say in."""
    return {"title": title, "blocks": [b for b in blocks if b]}


def text(words: str) -> Model:
    return {"type": "text", "text": line(words)}


def items(found: Iterable[str]) -> Model:
    return {"type": "list", "items": [line(item) for item in found]}


def unit(name: str) -> str:
    """Of a metric; a campaign of another version may have names that this one does not know."""
    try:
        return metrics.get(name).unit
    except metrics.MetricError:
        return "not registered"


def curve_block(made: Sequence[Model], keys: Iterable[str]) -> Model | None:
    names = [k for k in keys if any(k in arm["series"] for arm in made)]
    units = {k: unit(k) for k in names}
    return {"type": "curves", "arms": made, "metrics": names, "units": units, "axes": AXES} if names else None


def band(seeds: Iterable[Columns], key: str, most: int) -> Model | None:
    """One metric over the rows of some trials, at the steps that all have: x for each axis, y, and lo and hi where
    there are several; at most `most` points, extremes kept."""
    found = []
    for columns in seeds:
        at, values = columns.get(key)
        at, values = at[known := np.isfinite(values)], values[known]
        steps, last = np.unique(columns.axis("step")[at][::-1], return_index=True)
        if len(at):
            found.append((columns, steps, at[::-1][last], values[::-1][last]))
    shared = reduce(np.intersect1d, [f[1] for f in found]) if found else ()
    if not len(shared):
        return None
    where = [np.searchsorted(steps, shared) for _, steps, _, _ in found]
    values = np.array([v[i] for (*_, v), i in zip(found, where, strict=True)], float)
    low, high = values.min(0), values.max(0)
    keep = thin(low, high, most)
    rows = [(columns, at[i[keep]]) for (columns, _, at, _), i in zip(found, where, strict=True)]
    step = shared[keep].astype(float)
    axes = {a: np.mean([np.nan_to_num(c.axis(a)[at]) for c, at in rows], 0) for a in AXES if a != "step"}
    made = {"n": len(found), "x": {"step": sixes(step), **{a: _factor(step, xs) for a, xs in axes.items()}}}
    made |= {"y": sixes(np.median(values, 0)[keep])}
    if len(found) > 1:
        made |= {"lo": sixes(low[keep]), "hi": sixes(high[keep])}
    return made


def thin(low: Sequence[float] | np.ndarray, high: Sequence[float] | np.ndarray, most: int) -> list[int]:
    """Indices of at most `most` points: the first, the last, and of each stretch between the lowest and the highest."""
    size = len(low)
    if size <= most:
        return list(range(size))
    parts = (most - 2) // 2
    starts = np.arange(parts) * size // parts
    stretch = np.searchsorted(starts, np.arange(size), "right")
    lowest, highest = (np.lexsort((side, stretch))[starts] for side in (np.asarray(low), -np.asarray(high)))
    return sorted({0, size - 1, *lowest.tolist(), *highest.tolist()})


def six(value: float) -> float:
    """Six digits: more than any screen shows, half the bytes."""
    return sixes(np.array([value]))[0]


def sixes(values: np.ndarray) -> list[float]:
    """Each with six digits; whole numbers as int."""
    values = values.astype(float)
    with np.errstate(divide="ignore"):
        digits = 5 - np.floor(np.log10(np.abs(values)))
    up, down = 10.0 ** np.clip(digits, 0, 22), 10.0 ** np.clip(-digits, 0, None)  # powers of ten are exact up to 22
    short = np.where((digits <= 22) & (values != 0), np.rint(values * up / down) / up * down, values)
    return [int(v) if v.is_integer() and abs(v) < 1e15 else v for v in short.tolist()]


def _factor(steps: np.ndarray, xs: np.ndarray) -> Any:
    """An axis as one factor of the step where it is proportional to it, else its values."""
    if not steps[-1]:
        return sixes(xs)
    factor = xs[-1] / steps[-1]
    return six(factor) if (np.abs(xs - factor * steps) <= 1e-5 * np.abs(xs)).all() else sixes(xs)
