# SPDX-License-Identifier: MIT
"""One table, four forms: terminal, markdown, CSV, JSON.  Text from users stays inert in each of them."""

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Cell = str | int | float | bool | None
_MARKDOWN = {**{c: "\\" + c for c in "\\`*[]|!"}, "&": "&amp;", "<": "&lt;", ">": "&gt;"}
_FORMULA = ("=", "+", "-", "@")  # and TAB and CR, which no cell has


@dataclass(frozen=True, slots=True)
class Table:
    """Columns and rows.  A number keeps its value in CSV and JSON; people see it as `formats` says (.4f)."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    formats: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """What a reader must know and a program does not parse: a verb prints it beside the table."""

    def text(self) -> str:
        """Aligned columns for a terminal; numbers to the right."""
        cells = [[line(c) for c in self.columns], *([line(c) for c in row] for row in self._shown())]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        right = [self._is_number(i) for i in range(len(widths))]
        lines = (
            "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
            for row in cells
        )
        return "\n".join(text.rstrip() for text in lines)

    def markdown(self) -> str:
        """A pipe table."""
        marks = ["--:" if self._is_number(i) else "---" for i in range(len(self.columns))]
        rows = [list(map(escape, self.columns)), marks, *(list(map(escape, row)) for row in self._shown())]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def csv(self) -> str:
        """Full precision; a text that a spreadsheet would run as a formula gets an apostrophe."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([_inert(c) for c in row] for row in self.rows)
        return out.getvalue()

    def json(self) -> str:
        """A list with an object for each row."""
        return json.dumps([dict(zip(self.columns, row, strict=True)) for row in self.rows], indent=1, allow_nan=False)

    def render(self, form: str) -> str:
        """As `table`, `json` or `csv`."""
        return {"table": self.text, "json": self.json, "csv": self.csv}[form]()

    def _shown(self) -> list[list[str]]:
        return [
            [shown(c, self.formats.get(name, "")) for name, c in zip(self.columns, row, strict=True)]
            for row in self.rows
        ]

    def _is_number(self, i: int) -> bool:
        return any(isinstance(row[i], int | float) for row in self.rows) and not any(
            isinstance(row[i], str) for row in self.rows
        )


def shown(value: Any, form: str = "") -> str:
    """A cell as people read it; `-` for what does not exist."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "y" if value else "n"
    if isinstance(value, float):
        return format(value, form or ".6g")
    return str(value)


def line(text: str) -> str:
    """One line without control characters, so that a name can neither break a table nor drive a terminal."""
    if text.isprintable() and "  " not in text:  # nearly all cells, ten times faster
        return text.strip()
    return re.sub(r"\s+", " ", "".join(c if c.isprintable() else " " for c in text)).strip()


def escape(text: str) -> str:
    """Text that markdown and HTML show as it is."""
    return "".join(_MARKDOWN.get(c, c) for c in line(text))


def _inert(cell: Cell) -> Cell:
    if not isinstance(cell, str):
        return cell
    text = line(cell)
    return "'" + text if text.startswith(_FORMULA) else text


def merge(columns: Sequence[str], rows: Sequence[Sequence[Cell]], formats: Mapping[str, str] | None = None) -> Table:
    """A table from lists."""
    return Table(tuple(columns), tuple(map(tuple, rows)), formats or {})
