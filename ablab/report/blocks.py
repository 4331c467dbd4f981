# SPDX-License-Identifier: MIT
"""Pages that load nothing: the document with its policy, and the blocks that page.js draws.

A page is safe against its content: a policy that allows the hashes of our script and style alone, data in
application/json blocks, and a script that only ever sets text.
"""

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean, median
from typing import Any

from ablab import metrics
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


def band(seeds: Sequence[Sequence[Mapping[str, Any]]], key: str, most: int) -> Model | None:
    """One metric over the rows of some trials, at the steps that all have: x for each axis, y, and lo and hi where
    there are several; at most `most` points, extremes kept."""
    found = [{r["step"]: r for r in rows if r["m"].get(key) is not None} for rows in seeds]
    found = [rows for rows in found if rows]
    steps = sorted(set.intersection(*map(set, found))) if found else []
    if not steps:
        return None
    values = [[rows[s]["m"][key] for rows in found] for s in steps]
    keep = thin([min(v) for v in values], [max(v) for v in values], most)
    axes = {a: [six(fmean(rows[steps[i]].get(a, 0) for rows in found)) for i in keep] for a in AXES}
    made = {"n": len(found), "x": {a: xs if a == "step" else _factor(axes["step"], xs) for a, xs in axes.items()}}
    made |= {"y": [six(median(values[i])) for i in keep]}
    if len(found) > 1:
        made |= {"lo": [six(min(values[i])) for i in keep], "hi": [six(max(values[i])) for i in keep]}
    return made


def thin(low: Sequence[float], high: Sequence[float], most: int) -> list[int]:
    """Indices of at most `most` points: the first, the last, and of each stretch between the lowest and the highest."""
    size = len(low)
    if size <= most:
        return list(range(size))
    keep, parts = {0, size - 1}, (most - 2) // 2
    for i in range(parts):
        stretch = range(i * size // parts, (i + 1) * size // parts)
        keep |= {min(stretch, key=low.__getitem__), max(stretch, key=high.__getitem__)}
    return sorted(keep)


def six(value: float) -> float:
    """Six digits: more than any screen shows, half the bytes."""
    short = float(f"{value:.6g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


def _factor(steps: Sequence[float], xs: Sequence[float]) -> Any:
    """An axis as one factor of the step where it is proportional to it, else its values."""
    if not steps[-1]:
        return xs
    factor = xs[-1] / steps[-1]
    return six(factor) if all(abs(x - factor * s) <= 1e-5 * abs(x) for x, s in zip(xs, steps, strict=True)) else xs
