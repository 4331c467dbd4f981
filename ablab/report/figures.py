# SPDX-License-Identifier: MIT
"""`make plots` and `make plot-check`: figures of a campaign, and whether figures still show what their inputs say."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ablab import rundir
from ablab.report import load, page, plots
from ablab.report.table import Table, merge

EXCLUDED = "figures.txt"
"""Beside figures: a line `NAME.png: reason` for each picture that is none or whose inputs are not kept."""


def draw(campaign: rundir.Campaign, kind: str) -> tuple[int, list[str]]:
    """Draw a set; (exit code, lines): 0 drawn, 1 nothing to draw, 3 trials that may not be compared."""
    c = load.read(campaign)
    campaign.report.mkdir(exist_ok=True)
    try:
        drawn = plots.draw(c, page.judge(c), plots.chosen(kind), c.certified)
    except plots.NotComparableError as error:
        return 3, [f"NOT COMPARABLE: {error}"]
    lines = [f"{name}: {', '.join(plots.SUFFIXES)}" for name in drawn]
    return (0, lines) if drawn else (1, [f"{c.name}: nothing to draw for SET={kind}: no done trial has what it shows"])


def check(paths: Sequence[Path], results: Path) -> Table:
    """Every PNG below the paths: ok, excluded (with its reason), stale, orphan or edited, and why."""
    rows = []
    for path in paths:
        if not path.exists():
            raise plots.PlotError(f"PATHS={path}: no such file or folder; name folders with figures, as in PATHS=docs")
        for png in sorted(path.rglob("*.png")) if path.is_dir() else [path]:
            rows.append((str(png), *_judge(png, results)))
    return merge(("figure", "state", "why"), rows)


def is_good(found: Table) -> bool:
    """Whether every figure is ok or excluded."""
    return all(row[1] in ("ok", "excluded") for row in found.rows)


def _judge(png: Path, results: Path) -> tuple[str, str]:
    if reason := dict(_excluded(png.parent)).get(png.name):
        return "excluded", reason
    origin = _origin(png)
    if origin is None:
        return "orphan", "carries no origin: not drawn by ablab"
    csv, beside = png.with_suffix(".csv"), png.with_suffix(".json")
    if not csv.exists() or not beside.exists():
        return "orphan", f"{csv.name} or {beside.name} is not beside it"
    data = csv.read_bytes()
    if hashlib.sha256(data).hexdigest() != origin["csv"]:
        return "edited", f"{csv.name} is not what was drawn"
    known = json.loads(beside.read_bytes())
    if any(known.get(key) != value for key, value in origin.items()):
        return "edited", f"{beside.name} tells another origin than the picture"
    try:
        c = load.read(rundir.find(results, origin["query"]["campaign"]))
    except rundir.RunError:
        return "orphan", f"campaign {origin['query']['campaign']} is not below {results.name}/"
    if c.inputs() != origin["inputs"]:
        return "stale", "trials of the campaign have changed"
    try:
        found = plots.figure(origin["figure"]).info(c, page.judge(c))
    except (plots.PlotError, plots.NotComparableError) as error:
        return "stale", str(error)
    if found is None or found.table().csv().encode() != data:
        return "stale", "the same inputs give other numbers now"
    return "ok", origin["certificate"]


def _origin(png: Path) -> Mapping[str, Any] | None:
    """What a PNG carries, None without or with a foreign one."""
    from PIL import Image

    try:
        with Image.open(png) as picture:
            found = json.loads(picture.info.get("Description", ""))
        return found if found["schema"] == "ablab.figure/1" and found["query"]["campaign"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _excluded(folder: Path) -> Iterator[tuple[str, str]]:
    listed = folder / EXCLUDED
    for text in listed.read_text().splitlines() if listed.exists() else ():
        name, _, reason = text.partition(": ")
        if reason.strip():
            yield name.strip(), reason.strip()
