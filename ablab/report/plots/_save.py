# SPDX-License-Identifier: MIT
"""Writes a figure as PNG, SVG, CSV and JSON that carry where they come from; same input, same bytes."""

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from ablab import rundir
from ablab.report.plots import SUFFIXES, _style
from ablab.report.table import Cell, Table, merge


@dataclasses.dataclass(frozen=True, slots=True)
class Sheet:
    """All numbers and texts of a figure that is one table."""

    title: str
    labels: tuple[str, ...]
    """Of its axes, in the order of its panels."""
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def table(self) -> Table:
        return merge(self.columns, self.rows)

    def column(self, name: str) -> list[Any]:
        i = self.columns.index(name)
        return [row[i] for row in self.rows]

    def groups(self, name: str) -> dict[Any, "Sheet"]:
        """The rows of each value of a column, in the order of their first."""
        i = self.columns.index(name)
        found: dict[Any, list[tuple[Cell, ...]]] = {}
        for row in self.rows:
            found.setdefault(row[i], []).append(row)
        return {key: dataclasses.replace(self, rows=tuple(rows)) for key, rows in found.items()}


class Info(Protocol):
    """What a figure shows, all of it."""

    def table(self) -> Table:
        """Exactly what is drawn."""
        ...


def save(folder: Path, name: str, info: Info, draw: Callable[[Any], Any], origin: Mapping[str, Any]) -> str:
    """Write NAME.png, .svg, .csv and .json below `folder`; returns the name.

    `origin` is commit, query, trial ids and the hash of the inputs; the hash of the CSV joins it, so that an
    edited number shows.
    """
    csv = info.table().csv().encode()
    origin = {"schema": "ablab.figure/1", "figure": name, **origin, "csv": hashlib.sha256(csv).hexdigest()}
    meta = json.dumps(origin, sort_keys=True)
    with _style.style():
        figure = draw(info)
        png, svg = io.BytesIO(), io.BytesIO()
        figure.savefig(png, format="png", dpi=_style.DPI, metadata={"Software": "ablab", "Description": meta})
        figure.set_layout_engine("none")  # keep the one that the PNG has got
        figure.savefig(svg, format="svg", metadata={"Creator": "ablab", "Date": None, "Description": meta})
    body = json.dumps({**origin, "info": dataclasses.asdict(info)}, indent=1, allow_nan=False) + "\n"  # type: ignore[call-overload]
    for suffix, data in zip(SUFFIXES, (png.getvalue(), svg.getvalue(), csv, body.encode()), strict=True):
        rundir.write_bytes(folder / f"{name}.{suffix}", data)
    return name
