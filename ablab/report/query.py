# SPDX-License-Identifier: MIT
"""Find trials by a selector and list what they hold: `ls`, `keys`, `series`, `diff`."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from operator import eq, ge, gt, le, lt, ne
from pathlib import Path
from typing import Any

from ablab import kconf, metrics, plan, rundir
from ablab.report import load
from ablab.report.load import Trial
from ablab.report.table import Cell, Table, merge

SELECTORS = "CAMPAIGN, CAMPAIGN/TRIAL, CAMPAIGN/step:ID, a hash prefix of 6 or more, latest, step:ID; * and ? match"
_TEST = re.compile(r"\s*([\w./<>-]+?)\s*(<=|>=|!=|=|<|>)\s*(\"[^\"]*\"|'[^']*'|\S+)\s*")
_HEX = re.compile("[0-9a-f]{6,64}")
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {"=": eq, "!=": ne, "<": lt, "<=": le, ">": gt, ">=": ge}
_FACTS: dict[str, Callable[[Trial], Any]] = {
    "campaign": lambda t: t.dir.campaign.name,
    "trial": lambda t: t.id,
    "step": lambda t: t.record["step"],
    "seed": lambda t: t.seed,
    "state": lambda t: t.state,
}


class QueryError(ValueError):
    """A selector that finds nothing or too much, or a condition of bad form: exit 2."""


def resolve(results: Path, selectors: Sequence[str]) -> list[Trial]:
    """The trials of all selectors, each once, in plan order of their campaigns.

    Raises QueryError or RunError for a selector that finds nothing or is ambiguous.
    """
    known, read = rundir.campaigns(results), cache(load.read)  # several selectors may meet in one campaign
    found: dict[Path, Trial] = {}
    for selector in selectors:
        folders, pattern = _split(results, known, selector)
        hits = [t for c in folders for t in read(c).trials if _matches(t.record, pattern)]
        if not hits:
            names = " ".join(c.name for c in known[-8:]) or "none"
            raise QueryError(f"{selector}: selects no trial; write {SELECTORS}; campaigns: {names}")
        found |= {t.dir.path: t for t in hits}
    return list(found.values())


def _split(results: Path, known: list[rundir.Campaign], selector: str) -> tuple[list[rundir.Campaign], str]:
    """(campaigns to look in, pattern of the trials)."""
    if selector.startswith("imported:"):
        raise QueryError(f"{selector}: nothing is imported; select a campaign of this machine")
    if selector.startswith("step:"):
        return [c for c in known if any(_matches(r, selector) for r in c.records().values())][-1:], selector
    name, _, pattern = selector.partition("/")
    if re.search(r"[*?[]", name):
        return [c for c in known if fnmatchcase(c.name, name)], pattern or "*"
    hashes = {r["hash"] for c in known for r in c.records().values() if r["hash"].startswith(selector)}
    if _HEX.fullmatch(selector) and not any(c.name.startswith(selector) for c in known):
        if len(hashes) > 1:
            raise QueryError(f"{selector}: starts {len(hashes)} hashes; write more of it")
        return known, selector
    return [rundir.find(results, name)], pattern or "*"


def _matches(record: Mapping[str, Any], pattern: str) -> bool:
    """By step:ID, id, folder name or hash prefix."""
    if pattern.startswith("step:"):
        return fnmatchcase(record["step"] or "", pattern.removeprefix("step:"))
    by_name = any(fnmatchcase(name, pattern) for name in (record["id"], rundir.folder_of(record)))
    return by_name or (_HEX.fullmatch(pattern) is not None and record["hash"].startswith(pattern))


def ls(results: Path, selectors: Sequence[str] = (), where: str = "", sort: str = "") -> Table:
    """Campaigns without a selector, else trials; `where` is `state=done and val_loss<3.3`, `sort` a
    column."""
    if not selectors and not where:
        loaded = [load.read(c) for c in rundir.campaigns(results)]
        facts = [(c.name, c.content["created"], c.content["kind"], c.key) for c in loaded]
        counts = [(len(c.trials), sum(t.is_done for t in c.trials)) for c in loaded]
        rows = [(*f, *n) for f, n in zip(facts, counts, strict=True)]
        return _sorted(merge(("campaign", "created", "kind", "metric", "trials", "done"), rows), sort)
    tests = [_test(part) for part in re.split(r"\s+and\s+", where.strip()) if part]
    trials = resolve(results, selectors or ["*"])
    rows = [_row(t) for t in trials if all(test(t) for test in tests)]
    return _sorted(merge((*_FACTS, "hash", "metric", "value"), rows), sort)


def _row(t: Trial) -> tuple[Cell, ...]:
    metric = t.dir.campaign.content["registration"]["metric"]
    value = t.value(metric["key"], metric["mode"])
    return (*(fact(t) for fact in _FACTS.values()), t.record["hash"][:8], metric["key"], value)


def _sorted(table: Table, column: str) -> Table:
    if not column:
        return table
    if column not in table.columns:
        raise QueryError(f"SORT={column}: no such column; columns: {' '.join(table.columns)}")
    i = table.columns.index(column)
    key = lambda row: (row[i] is None, isinstance(row[i], str), row[i] if row[i] is not None else 0)
    return Table(table.columns, tuple(sorted(table.rows, key=key)), table.formats)


def _test(text: str) -> Callable[[Trial], bool]:
    """One condition; parsed, never run as code.  A trial without the value does not fulfil it."""
    match = _TEST.fullmatch(text)
    if not match:
        raise QueryError(f"WHERE={text}: expected NAME=VALUE, or != < <= > >=; several are joined by ' and '")
    name, operator, wanted = match[1].removeprefix("CONFIG_"), match[2], match[3]
    if name not in _FACTS and not name.isupper():
        metrics.get(name)

    def test(t: Trial) -> bool:
        value = _FACTS[name](t) if name in _FACTS else t.values.get(name) if name.isupper() else t.value(name)
        sides = [_number(str(side).strip("\"'")) for side in (value, wanted)]
        alike = isinstance(sides[0], str) == isinstance(sides[1], str)
        return value is not None and alike and _OPERATORS[operator](*sides)

    return test


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def keys(trials: Iterable[Trial], prefix: str = "") -> Table:
    """Metrics that trials wrote: unit, points, first and last step."""
    found: dict[str, list[int]] = {}
    for t in trials:
        for row in t.rows():
            for name in row["m"]:
                if name.startswith(prefix):
                    found.setdefault(name, []).append(row["step"])
    rows = [(n, metrics.get(n).unit, len(steps), min(steps), max(steps)) for n, steps in sorted(found.items())]
    return merge(("metric", "unit", "points", "first step", "last step"), rows)


def series(trials: Iterable[Trial], names: Sequence[str], axis: str = "step", points: int = 0) -> Table:
    """Values of metrics along an axis, a row for each trial and point; `points` thins the rows of a trial."""
    if axis not in metrics.AXES:
        raise QueryError(f"X={axis}: no such axis; axes: {' '.join(metrics.AXES)}")
    for name in names:
        metrics.get(name)
    rows: list[tuple[Cell, ...]] = []
    for t in trials:
        found = t.rows(*names)
        if 1 < points < len(found):
            found = [found[round(i * (len(found) - 1) / (points - 1))] for i in range(points)]
        rows += [(t.dir.campaign.name, t.id, r[axis], *(r["m"].get(n) for n in names)) for r in found]
    return merge(("campaign", "trial", axis, *names), rows)


def diff(a: Trial, b: Trial, everything: bool = False) -> Table:
    """Symbols whose effective values differ and what set them, then what differs in the built model."""
    built = [dict(_flat(t.dir.built() or {})) for t in (a, b)]
    rows: list[tuple[Cell, ...]] = []
    for name in dict.fromkeys([*a.values, *b.values]):
        left, right = a.values.get(name), b.values.get(name)
        if everything or (left != right and kconf.decides(name)):
            rows.append((name, left, right, _setter(a, name), _setter(b, name)))
    for name in dict.fromkeys([*built[0], *built[1]]):
        left, right = built[0].get(name), built[1].get(name)
        if everything or left != right:
            rows.append((f"built {name}", left, right, None, None))
    return merge(("what", "A", "B", "A set by", "B set by"), rows)


def _setter(t: Trial, name: str) -> str:
    """The arm where step or axes change the symbol, else the base of the campaign."""
    changed = any(line.startswith(f"CONFIG_{name}=") for line in t.record["overrides"])
    return plan.arm_text(t.record["step"], t.record["axes"]) if changed else "base"


def _flat(value: Any, at: str = "") -> Iterator[tuple[str, str]]:
    """Leaves of nested JSON by dotted path, as text."""
    if isinstance(value, Mapping | list):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in items:
            yield from _flat(inner, f"{at}.{key}" if at else str(key))
    elif at != "schema":
        yield at, str(value)
