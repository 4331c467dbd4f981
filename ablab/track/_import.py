# SPDX-License-Identifier: MIT
"""`tracker import`: every row of a run that a tracker has, into a read-only folder beside the campaigns."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ablab import plugin
from ablab.metrics import AXES
from ablab.rundir import Imported, Rows, RunError
from ablab.track import _mirror

OURS = (*AXES, "attempt", "q", "iteration", "epoch", "epoch_time", "timestamp")


def main(results: Path, source: str, name: str) -> int:
    """Import `wandb:ENTITY/PROJECT/RUN` or `trackio:PROJECT/RUN`; 2 where it is not, or the name is taken."""
    slug, _, address = source.partition(":")
    try:
        if not address or f"TRACK_{slug.upper()}" not in plugin.members("TRACK"):
            raise ValueError(f"{source}: write wandb:ENTITY/PROJECT/RUN or trackio:PROJECT/RUN")
        member = _mirror.made(slug, _mirror.values_of([slug], ""))
        member.installed()
        config, rows = member.fetch(address)
        place = save(results, name or plain(address), source, config, rows)
    except ValueError as error:
        print(error)
        return 2
    origin = place.origin()
    gaps = "".join(f"\n  gap: {gap}" for gap in origin["gaps"])
    print(f"imported:{place.name}: {origin['rows']} rows of {source}, sha256 {origin['sha256'][:12]}{gaps}")
    return 0


def plain(address: str) -> str:
    """A name that a folder may have, from the end of an address."""
    return re.sub(r"[^a-z0-9._-]+", "-", address.rpartition("/")[2].lower()).strip("-._")[:100] or "run"


def save(results: Path, name: str, source: str, config: Mapping[str, Any], rows: list[dict[str, Any]]) -> Imported:
    """Write the rows as they are.  Raises RunError for a name that is taken."""
    place = Imported(results, name)
    place.path.parent.mkdir(exist_ok=True, parents=True)
    try:
        place.path.mkdir()
    except FileExistsError:
        raise RunError(f"{place.path}: exists; choose another name with NAME=") from None
    out = Rows(place.metrics, "metrics", {"trial": name, "attempt": 1, "resumed_at_step": 0})
    gaps, before = [], None
    for q, row in enumerate(rows):
        number = row.get("_step", q)  # of W&B, which leaves out rows that it dropped
        if before is not None and number != before + 1:
            gaps.append(f"row {before + 1} to {number - 1} missing")
        before = number
        step = row.get("step", row.get("iteration", row.get("_step", q)))
        m = {n: v for n, v in row.items() if n not in OURS and not n.startswith("_") and _is_number(v)}
        axes = {n: float(row.get(n) or 0) for n in AXES if n != "step"}
        bad = [n for n, v in m.items() if not math.isfinite(v)]
        t = float(row.get("_timestamp") or 0)
        out.line({"q": q, "t": t, "step": int(step), **axes, "m": {**m, **dict.fromkeys(bad)}, "bad": bad})
    out.close()
    place.seal(source, {n: v for n, v in config.items() if not n.startswith("_")}, gaps, len(rows))
    return place


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)
