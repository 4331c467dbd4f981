# SPDX-License-Identifier: MIT
"""Two arms side by side: which symbols and protocol fields differ, then, if that is declared, the metrics."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from ablab import kconf, metrics, plan
from ablab.report import query
from ablab.report.query import QueryError
from ablab.report.table import Cell, Table, line, merge

NOT_COMPARABLE = "NOT COMPARABLE"
HASH = re.compile(r"\b[0-9a-f]{64}\b")
LENSES = {"time": "train_s", "tokens": "tokens", "flops": "flops", "memory": ""}
"""What is held equal -> the axis of rows that counts it; memory has none, there the peaks must agree."""
EQUAL_MEMORY = 0.01
_UNEQUAL = "not"
_MODES = {"t": "mean", "s": "sum", "m": "max"}
_FORMATS = {"difference": "+.5g", "%": "+.2f"}
_COLUMNS = ("metric", "unit", "base", "other", "difference", "%", "n base", "n other", "over", "note")
_SHOWN = ("unit", "base", "other", "difference", "%")
# field of the manifest that must be equal -> prefixes of the symbols that may declare a difference
_PROTOCOL: dict[str, tuple[str, ...]] = {
    "budget.kind": (),
    "budget.limit": (),
    "batch.effective": ("TRAIN_BATCH_EFFECTIVE",),
    "batch.seq_len": ("MODEL_", "DATA_"),
    "batch.world": (),
    **dict.fromkeys(("data.name", "data.sha256", "data.tokenizer", "data.split"), ("DATA_",)),
    "resolved.compile": ("SYS_COMPILE_",),
    "resolved.amp": ("SYS_AMP_",),
    "resolved.tf32": ("SYS_TF32",),
    "resolved.cudnn_benchmark": ("SYS_CUDNN_", "SYS_DETERMINISTIC"),
    "resolved.attention_kernel": ("ATTN_", "MODEL_", "SYS_"),
    "resolved.lse_kernel": ("ATTN_", "MODEL_", "SYS_"),
    **dict.fromkeys((f"software.{name}" for name in ("python", "torch", "cuda", "hip", "driver")), ()),
    "code.tree": (),
    "hardware": (),
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """One arm against the base arm."""

    title: str
    differences: Table
    """What differs, and whether the frozen plans declare it."""
    undeclared: tuple[str, ...]
    """What stands between the numbers and a meaning, each with what to do."""
    values: Table | None
    """Metrics; None where something is undeclared and nobody insisted."""
    missing: tuple[str, ...]
    """Trials that are not counted."""

    @property
    def code(self) -> int:
        """Exit code: 3 not comparable, 1 nothing to compare, 0 good."""
        return 3 if self.undeclared else 0 if self.values and self.values.rows else 1

    def text(self) -> str:
        """For a terminal."""
        parts = [self.title, self.differences.text() if self.differences.rows else "nothing differs"]
        parts += [f"{NOT_COMPARABLE}: {line(text)}" for text in self.undeclared]
        parts += [self.values.text()] if self.values else []
        return "\n".join([*parts, *(line(f"not counted: {text}") for text in self.missing)])

    def data(self) -> dict[str, Any]:
        """For scripts."""
        tables = {"differences": self.differences, "values": self.values}
        made = {name: found and json.loads(found.json()) for name, found in tables.items()}
        return {"title": self.title, "code": self.code, **made, "undeclared": self.undeclared, "missing": self.missing}


def flat(found: Sequence[Comparison]) -> Table:
    """Comparisons as one table: a row for each difference, then for each value and each trial that is missing."""
    rows: list[tuple[Cell, ...]] = []
    for c in found:
        rows += [(c.title, how, name, None, x, y, *[None] * 3) for name, x, y, how in c.differences.rows]
        if c.values:
            dicts = (dict(zip(c.values.columns, row, strict=True)) for row in c.values.rows)
            rows += [(c.title, "value", d["metric"], *(d[k] for k in _SHOWN), d["note"]) for d in dicts]
        rows += [(c.title, "missing", text, *[None] * 6) for text in c.missing]
    return merge(("pair", "kind", "what", *_SHOWN, "note"), rows)


def compare(
    base: Sequence[Any],
    others: Sequence[Sequence[Any]],
    keys: Sequence[str] = (),
    anyway: bool = False,
    lens: str = "",
) -> list[Comparison]:
    """Each arm of `others` against `base`; with several arms on both sides, those of equal name.

    Metrics are taken at the end of each trial, or through a lens of LENSES where both sides have used as much.
    Raises QueryError where it is not clear which arms to compare.
    """
    query.prepare([t for side in (base, *others) for t in side])
    for key in keys:
        query.known(key, [t for side in (base, *others) for t in side])
    left, found = _arms(base), []
    for other in others:
        right = _arms(other)
        if min(len(left), len(right)) == 1:
            pairs = [(a, b) for a in left.values() for b in right.values()]
        else:
            pairs = [(left[name], right[name]) for name in left if name in right]
        if not pairs:
            names = f"{base[0].campaign} has {', '.join(left)}; {other[0].campaign} has {', '.join(right)}"
            raise QueryError(f"no arm is in both: {names}; name one: CAMPAIGN/step:ID or CAMPAIGN/TRIAL")
        found += [_compare(a, b, keys, anyway, lens) for a, b in pairs]
    return found


def _arms(trials: Sequence[Any]) -> dict[str, list[Any]]:
    arms: dict[str, list[Any]] = {}
    for t in trials:
        arms.setdefault(t.arm, []).append(t)
    return arms


def differences(a: Sequence[Any], b: Sequence[Any]) -> list[tuple[str, Cell, Cell, str]]:
    """Fields of the done trials, and symbols, that differ between two arms: each `declared` or `undeclared`."""
    done = [[t for t in side if t.is_done] for side in (a, b)]
    symbols = list(_symbols(a[0], b[0]))
    declared = [name for name, _, _, how in symbols if how == "declared"]
    return (list(_protocol(*done, declared)) if all(done) else []) + symbols


def undeclared(rows: Sequence[tuple[str, Cell, Cell, str]]) -> tuple[str, ...]:
    """Those of `differences` that nobody declared, each with what to do."""
    return tuple(f"{name}: {x} | {y}: {_remedy(name, x, y)}" for name, x, y, how in rows if how != "declared")


def _compare(a: Sequence[Any], b: Sequence[Any], keys: Sequence[str], anyway: bool, lens: str) -> Comparison:
    done = [[t for t in side if t.is_done] for side in (a, b)]
    found = undeclared(rows := differences(a, b))
    names = [f"{s[0].arm} of {s[0].campaign} (n={len(d)} of {len(s)})" for s, d in zip((a, b), done, strict=True)]
    shown = anyway or not found
    return Comparison(
        f"base {names[0]}, other {names[1]}",
        merge(("what", "base", "other", "treatment"), rows),
        found,
        (_through(*done, keys, lens) if lens else _values(*done, keys)) if shown else None,
        tuple(f"{t.id} of {t.campaign} ({t.state})" for t in (*a, *b) if not t.is_done),
    )


def _symbols(a: Any, b: Any) -> Iterator[tuple[str, Cell, Cell, str]]:
    """Differing symbols.  A difference is declared where the two frozen bases agree: then only steps and axes,
    and what follows from them, can have made it."""
    for name in dict.fromkeys([*a.values, *b.values]):
        x, y = a.values.get(name), b.values.get(name)
        if x != y and name != plan.SEED and kconf.decides(name):
            agree = None not in (a.base, b.base) and a.base.get(name) == b.base.get(name)
            yield name, x, y, "declared" if agree else "undeclared"


def _protocol(a: Sequence[Any], b: Sequence[Any], declared: Sequence[str]) -> Iterator[tuple[str, Cell, Cell, str]]:
    """Fields of the manifests that differ between the sides or inside one."""
    facts = [[_facts(t.manifest) for t in side if t.manifest] for side in (a, b)]
    if not all(facts):
        absent = ["recorded" if side else "not recorded" for side in facts]
        if len(set(absent)) > 1:
            yield "manifest", *absent, "undeclared"
        return
    for name in facts[0][0]:
        x, y = (" / ".join(dict.fromkeys(str(f[name]) for f in side)) for side in facts)
        if x != y or " / " in x:
            x, y = (HASH.sub(lambda m: m[0][:12], side) for side in (x, y))
            is_treatment = any(symbol.startswith(_PROTOCOL[name]) for symbol in declared)
            yield name, x, y, "declared" if is_treatment else "undeclared"


def _facts(manifest: Mapping[str, Any]) -> dict[str, Any]:
    pairs = [name.split(".") for name in _PROTOCOL if "." in name]
    facts = {f"{part}.{field}": manifest[part].get(field) for part, field in pairs}
    devices = [f"{d['name']} {d['memory_bytes'] / 2**30:.0f} GiB" for d in manifest["devices"]]
    return facts | {"hardware": " + ".join(devices) or manifest["cpu"]["model"]}


def _remedy(name: str, x: Cell, y: Cell) -> str:
    if not name.isupper():
        return "run both in one campaign, on equal hardware and software"
    if x is None or y is None:
        return "start both from one base configuration"
    return f"make them equal (CONFIG_{name}={x}), or the treatment of one campaign (SWEEP='{name}={x},{y}')"


def _values(a: Sequence[Any], b: Sequence[Any], keys: Sequence[str]) -> Table:
    """Each trial as one number: what its rows say at the end, or what their aggregation is."""
    rows: list[tuple[Cell, ...]] = []
    for key in keys or dict.fromkeys(k for t in (*a, *b) for k in t.final):
        sides = [{t.seed: v for t in side if (v := _value(t, key)) is not None} for side in (a, b)]
        if all(sides):
            rows.append(_row(key, *sides, ""))
    return merge(_COLUMNS, rows, _FORMATS)


def _value(t: Any, key: str) -> float | None:
    registered = query.unit(key) is not None
    mode = _MODES.get(metrics.get(key).agg, "final") if registered else "final"
    return t.value(key, mode)


def _row(key: str, left: Mapping[Any, float], right: Mapping[Any, float], note: str) -> tuple[Cell, ...]:
    """Means of both sides, and the difference: over the seeds that they share, else of the means."""
    shared = sorted(left.keys() & right.keys() - {None})
    x, y = (fmean(side[s] for s in shared or side) for side in (left, right))
    means = fmean(left.values()), fmean(right.values()), y - x, 100 * (y - x) / abs(x) if x else None
    over = f"{len(shared)} shared seeds" if shared else "no shared seed"
    return (key, query.unit(key), *means, len(left), len(right), over, note or None)


def _through(a: Sequence[Any], b: Sequence[Any], keys: Sequence[str], lens: str) -> Table:
    """Metrics where both sides have used as much: at the largest amount that every trial reached, between the rows
    beside it, never beyond them.  A trial that goes on from there with a falling rate is in `mid-schedule`."""
    rows: list[tuple[Cell, ...]] = []
    for key in keys or dict.fromkeys(t.primary[0] for t in (*a, *b)):
        if lens == "memory":
            sides, note = [{t.seed: v for t in side if (v := _value(t, key)) is not None} for side in (a, b)], _peaks(
                a, b
            )
        else:
            sides, note = _at_equal(a, b, key, LENSES[lens])
        if not all(sides):
            rows.append((key, query.unit(key), *[None] * 4, *map(len, sides), None, note))
        elif note.startswith(_UNEQUAL):
            means = [fmean(side.values()) for side in sides]
            rows.append((key, query.unit(key), *means, None, None, *map(len, sides), None, note))
        else:
            rows.append(_row(key, *sides, note))
    return merge(_COLUMNS, rows, _FORMATS)


def _at_equal(a: Sequence[Any], b: Sequence[Any], key: str, axis: str) -> tuple[list[dict[Any, float]], str]:
    curves = [[(t, *t.curve(key, axis)) for t in side] for side in (a, b)]
    curves = [[c for c in side if len(c[1])] for side in curves]
    if not all(curves):
        return [{}, {}], f"no {key} over {axis}"
    at = min(x[-1] for side in curves for _, x, _ in side)
    sides = [{t.seed: float(np.interp(at, x, y)) for t, x, y in side if x[0] <= at} for side in curves]
    early = [
        name
        for name, side in zip(("base", "other"), curves, strict=True)
        if any(t.decays and at < x[-1] * (1 - 1e-9) for t, x, _ in side)  # rounding of the clock is not a lead
    ]
    return sides, f"at {axis} {at:.6g}" + (f"; mid-schedule: {', '.join(early)}" if early else "")


def _peaks(a: Sequence[Any], b: Sequence[Any]) -> str:
    peaks = [[gib for t in side if (gib := t.peak_gib) is not None] for side in (a, b)]
    if not all(peaks):
        return f"{_UNEQUAL} known: no peak memory recorded"
    x, y = map(max, peaks)
    text = f"peak {x:.4g} | {y:.4g} GiB"
    return text if abs(x - y) <= EQUAL_MEMORY * max(x, y) else f"{_UNEQUAL} equal: {text}"
