# SPDX-License-Identifier: MIT
"""Find trials by a selector and list what they hold: `ls`, `keys`, `series`, `diff`.

What these take are trials of this machine or runs of a tracker (`source.py`), which answer to the same names.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from operator import eq, ge, gt, le, lt, ne
from pathlib import Path
from typing import Any

import numpy as np

from ablab import kconf, metrics, rundir
from ablab.report import index, load, source
from ablab.report.load import NothingError, QueryError, Trial, flat, unit
from ablab.report.table import Cell, Table, merge

SELECTORS = (
    "CAMPAIGN, CAMPAIGN/TRIAL, CAMPAIGN/step:ID, a hash prefix of 6 or more, latest, step:ID, imported:NAME; * and ?"
    " match"
)
IMPORTED = "imported:"
_TEST = re.compile(r"\s*([\w./<>-]+?)\s*(<=|>=|!=|=|<|>)\s*(\"[^\"]*\"|'[^']*'|\S+)\s*")
_HEX = re.compile("[0-9a-f]{6,64}")
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {"=": eq, "!=": ne, "<": lt, "<=": le, ">": gt, ">=": ge}
FACTS = ("campaign", "trial", "step", "seed", "state")
_ATTRIBUTES = {**dict(zip(FACTS, FACTS, strict=True)), "trial": "id"}


def resolve(results: Path, selectors: Sequence[str]) -> list[Any]:
    """The trials of all selectors, each once, in plan order of their campaigns; `imported:` gives runs.

    Raises NothingError for a selector that finds nothing, QueryError or RunError for one that is ambiguous.
    """
    known, read = rundir.campaigns(results), cache(load.read)  # several selectors may meet in one campaign
    found: dict[Any, Any] = {}
    for selector in selectors:
        if selector.startswith(IMPORTED):
            found |= {(IMPORTED, r.id): r for r in source.imported(results, selector.removeprefix(IMPORTED))}
            continue
        folders, pattern = _split(results, known, selector)
        hits = [t for c in folders for t in read(c).trials if _matches(t.record, pattern)]
        if not hits:
            names = " ".join(c.name for c in known[-8:]) or "none"
            raise NothingError(f"{selector}: selects no trial; write {SELECTORS}; campaigns: {names}")
        found |= {t.dir.path: t for t in hits}
    return list(found.values())


def _split(results: Path, known: list[rundir.Campaign], selector: str) -> tuple[list[rundir.Campaign], str]:
    """(campaigns to look in, pattern of the trials)."""
    if selector.startswith("step:"):
        return [c for c in known if any(_matches(r, selector) for r in c.records().values())][-1:], selector
    name, _, pattern = selector.partition("/")
    if re.search(r"[*?[]", name):
        return [c for c in known if fnmatchcase(c.name, name)], pattern or "*"
    starts = [c for c in known if c.name.startswith(name)]
    if name and not starts and (results / rundir.checked(name) / rundir.Campaign.FILES["campaign"]).is_file():
        rundir.Campaign.open(results / name)  # raises what is wrong with it
    if _HEX.fullmatch(selector) and not starts:
        hashes = {r["hash"] for c in known for r in c.records().values() if r["hash"].startswith(selector)}
        if len(hashes) > 1:
            raise QueryError(f"{selector}: starts {len(hashes)} hashes; write more of it")
        return known, selector
    if name == "latest" or not starts or not name:
        return known[-1:] if name == "latest" else [], pattern or "*"
    return [rundir.find(results, name)], pattern or "*"


def _matches(record: Mapping[str, Any], pattern: str) -> bool:
    """By step:ID, id, folder name or hash prefix."""
    if pattern.startswith("step:"):
        return fnmatchcase(record["step"] or "", pattern.removeprefix("step:"))
    by_name = any(fnmatchcase(name, pattern) for name in (record["id"], rundir.folder_of(record)))
    return by_name or (_HEX.fullmatch(pattern) is not None and record["hash"].startswith(pattern))


def campaigns(results: Path, damage: list[str]) -> Table:
    """All campaigns: what they compare, how many trials, how many done; those that cannot be read go to `damage`."""
    loaded = []
    for c in rundir.campaigns(results, damage):
        try:
            loaded.append(load.read(c))
        except rundir.RunError as error:
            damage.append(str(error))
    facts = [(c.name, c.content["created"], c.content["kind"], c.key) for c in loaded]
    counts = [(len(c.trials), sum(t.is_done for t in c.trials)) for c in loaded]
    rows = [(*f, *n) for f, n in zip(facts, counts, strict=True)]
    return merge(("campaign", "created", "kind", "metric", "trials", "done"), rows)


def ls(trials: Sequence[Any], where: str = "") -> Table:
    """Trials with their result; `where` is `state=done and val_loss<3.3`."""
    tests = [_test(part, trials) for part in re.split(r"\s+and\s+", where.strip()) if part]
    rows = [_row(t) for t in trials if all(test(t) for test in tests)]
    return merge((*FACTS, "hash", "metric", "value"), rows)


def _row(t: Any) -> tuple[Cell, ...]:
    key, mode = t.primary
    return (*(getattr(t, _ATTRIBUTES[name]) for name in FACTS), t.hash[:8], key, t.value(key, mode))


def arranged(table: Table, column: str) -> Table:
    """The table, sorted by a column if one is named; what is missing comes last."""
    if not column:
        return table
    if column not in table.columns:
        raise QueryError(f"SORT={column}: no such column; columns: {' '.join(table.columns)}")
    i = table.columns.index(column)
    key = lambda row: (row[i] is None, isinstance(row[i], str), row[i] if row[i] is not None else 0)
    return Table(table.columns, tuple(sorted(table.rows, key=key)), table.formats)


def _test(text: str, trials: Sequence[Any]) -> Callable[[Any], bool]:
    """One condition; parsed, never run as code.  A trial without the value does not fulfil it.

    Raises QueryError for another form, MetricError for a name that is no fact, symbol, metric or setting of a run.
    """
    match = _TEST.fullmatch(text)
    if not match:
        raise QueryError(f"WHERE={text}: expected NAME=VALUE, or != < <= > >=; several are joined by ' and '")
    name, operator, wanted = match[1].removeprefix("CONFIG_"), match[2], match[3]
    is_setting = name.isupper() or (unit(name) is None and any(name in t.values for t in trials))
    if name not in _ATTRIBUTES and not is_setting:
        known(name, trials)

    def test(t: Any) -> bool:
        if name in _ATTRIBUTES:
            value = getattr(t, _ATTRIBUTES[name])
        else:
            value = t.values.get(name) if is_setting else t.value(name)
        sides = [_number(str(side).strip("\"'")) for side in (value, wanted)]
        alike = isinstance(sides[0], str) == isinstance(sides[1], str)
        return value is not None and alike and _OPERATORS[operator](*sides)

    return test


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def known(name: str, trials: Iterable[Any]) -> None:
    """Raises MetricError for a name that is neither registered nor in a trial, such as a run from elsewhere has."""
    if unit(name) is None and not any(name in t.columns.spans for t in trials):
        metrics.get(name)


def keys(trials: Sequence[Any], prefix: str = "") -> Table:
    """Metrics that trials wrote, by group: unit, points, first and last step, trials that have it."""
    prepare(trials)
    found: dict[str, list[index.Span]] = {}
    for t in trials:
        for name, span in t.columns.spans.items():
            if name.startswith(prefix):
                found.setdefault(name, []).append(span)
    rows = [
        (name, unit(name), sum(s.points for s in spans), min(s.first for s in spans), max(s.last for s in spans))
        + (len(spans),)
        for name, spans in sorted(found.items(), key=lambda item: ("/" in item[0], item[0]))
    ]
    return merge(("metric", "unit", "points", "first step", "last step", "trials"), rows)


def series(trials: Sequence[Any], names: Sequence[str], axis: str = "step", points: int = 0) -> Table:
    """Values of metrics along an axis, a row for each trial and point; `points` thins the rows of a trial.

    Trials without a point are in the notes of the table.
    """
    if axis not in metrics.AXES:
        raise QueryError(f"X={axis}: no such axis; axes: {' '.join(metrics.AXES)}")
    prepare(trials)
    for name in names:
        known(name, trials)
    rows: list[tuple[Cell, ...]] = []
    missing = []
    for t in trials:
        columns = [t.columns.get(name) for name in names]
        at = np.unique(np.concatenate([where for where, _ in columns]))
        if not len(at):
            missing.append(f"{t.id} of {t.campaign} ({t.state}): no {' '.join(names)}")
        if 1 < points < len(at):
            at = at[np.linspace(0, len(at) - 1, points).round().astype(np.int64)]
        cells = [_cells(t.columns.axis(axis)[at])]
        for where, values in columns:
            place = np.searchsorted(where, at).clip(max=max(len(where) - 1, 0))
            cells.append(
                [v if hit else None for v, hit in zip(_cells(values[place]), where[place] == at, strict=True)]
                if len(where)
                else [None] * len(at)
            )
        rows += zip([t.campaign] * len(at), [t.id] * len(at), *cells, strict=True)
    return Table(("campaign", "trial", axis, *names), tuple(rows), {}, tuple(missing))


def _cells(values: np.ndarray) -> list[Cell]:
    """Numbers of Python; None for what is not finite."""
    cells = values.tolist()
    return cells if np.isfinite(values).all() else [v if np.isfinite(v) else None for v in cells]


def prepare(trials: Sequence[Any]) -> None:
    """Index the rows of those trials that are on this machine, at once."""
    index.prepare([t.dir for t in trials if isinstance(t, Trial)])


def diff(a: Any, b: Any, everything: bool = False) -> Table:
    """Symbols whose effective values differ and what set them, then what differs in the built model."""
    built = [dict(flat(t.built)) for t in (a, b)]
    rows: list[tuple[Cell, ...]] = []
    for name in dict.fromkeys([*a.values, *b.values]):
        left, right = a.values.get(name), b.values.get(name)
        if everything or (left != right and kconf.decides(name)):
            rows.append((name, left, right, a.setter(name), b.setter(name)))
    for name in dict.fromkeys([*built[0], *built[1]]):
        left, right = built[0].get(name), built[1].get(name)
        if everything or left != right:
            rows.append((f"built {name}", left, right, None, None))
    return merge(("what", "A", "B", "A set by", "B set by"), rows)
