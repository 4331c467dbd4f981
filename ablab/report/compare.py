# SPDX-License-Identifier: MIT
"""Two arms side by side: which symbols and protocol fields differ, then, if that is declared, the metrics."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from ablab import kconf, metrics, plan
from ablab.report import query
from ablab.report.load import Trial
from ablab.report.query import QueryError
from ablab.report.table import Cell, Table, line, merge

NOT_COMPARABLE = "NOT COMPARABLE"
HASH = re.compile(r"\b[0-9a-f]{64}\b")
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


def compare(
    results: Path, base: str, others: Sequence[str], keys: Sequence[str] = (), anyway: bool = False
) -> list[Comparison]:
    """Each arm of `others` against `base`; with several arms on both sides, those of equal name.

    Raises QueryError for a selector that finds nothing or does not say which arms to compare.
    """
    for key in keys:
        metrics.get(key)
    left, found = _arms(query.resolve(results, [base])), []
    for other in others:
        right = _arms(query.resolve(results, [other]))
        if min(len(left), len(right)) == 1:
            pairs = [(a, b) for a in left.values() for b in right.values()]
        else:
            pairs = [(left[name], right[name]) for name in left if name in right]
        if not pairs:
            names = f"{base} has {', '.join(left)}; {other} has {', '.join(right)}"
            raise QueryError(f"no arm is in both: {names}; name one: CAMPAIGN/step:ID or CAMPAIGN/TRIAL")
        found += [_compare(a, b, keys, anyway) for a, b in pairs]
    return found


def _arms(trials: Sequence[Trial]) -> dict[str, list[Trial]]:
    arms: dict[str, list[Trial]] = {}
    for t in trials:
        arms.setdefault(plan.arm_text(t.record["step"], t.record["axes"]) or "base", []).append(t)
    return arms


def differences(a: Sequence[Trial], b: Sequence[Trial]) -> list[tuple[str, Cell, Cell, str]]:
    """Symbols, and fields of the done trials, that differ between two arms: each `declared` or `undeclared`."""
    done = [[t for t in side if t.is_done] for side in (a, b)]
    symbols = list(_symbols(a[0], b[0]))
    declared = [name for name, _, _, how in symbols if how == "declared"]
    return symbols + (list(_protocol(*done, declared)) if all(done) else [])


def undeclared(rows: Sequence[tuple[str, Cell, Cell, str]]) -> tuple[str, ...]:
    """Those of `differences` that nobody declared, each with what to do."""
    return tuple(f"{name}: {x} | {y}: {_remedy(name, x, y)}" for name, x, y, how in rows if how != "declared")


def _compare(a: Sequence[Trial], b: Sequence[Trial], keys: Sequence[str], anyway: bool) -> Comparison:
    done = [[t for t in side if t.is_done] for side in (a, b)]
    rows = differences(a, b)
    names = [
        f"{next(iter(_arms(s)))} of {s[0].dir.campaign.name} (n={len(d)} of {len(s)})"
        for s, d in ((a, done[0]), (b, done[1]))
    ]
    return Comparison(
        f"base {names[0]}, other {names[1]}",
        merge(("what", "base", "other", "treatment"), rows),
        found := undeclared(rows),
        _values(*done, keys) if anyway or not found else None,
        tuple(f"{t.id} of {t.dir.campaign.name} ({t.state})" for t in (*a, *b) if not t.is_done),
    )


def _symbols(a: Trial, b: Trial) -> Iterator[tuple[str, Cell, Cell, str]]:
    """Differing symbols.  A difference is declared where the two frozen bases agree: then only steps and axes,
    and what follows from them, can have made it."""
    bases = [
        {r.name: r.text for r in kconf.lex(Path(), t.dir.campaign.content["base"]["config"]).requests} for t in (a, b)
    ]
    for name in dict.fromkeys([*a.values, *b.values]):
        x, y = a.values.get(name), b.values.get(name)
        if x != y and name != plan.SEED and kconf.decides(name):
            yield name, x, y, "declared" if bases[0].get(name) == bases[1].get(name) else "undeclared"


def _protocol(a: Sequence[Trial], b: Sequence[Trial], declared: Sequence[str]) -> Iterator[tuple[str, Cell, Cell, str]]:
    """Fields of the manifests that differ between the sides or inside one."""
    facts = [[_facts(t.dir.manifest() or {}) for t in side] for side in (a, b)]
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


def _values(a: Sequence[Trial], b: Sequence[Trial], keys: Sequence[str]) -> Table:
    """Means of both sides, and the difference: over the seeds that they share, else of the means."""
    rows: list[tuple[Cell, ...]] = []
    for key in keys or dict.fromkeys(k for t in (*a, *b) if t.summary for k in t.summary["final"]):
        left, right = ({t.seed: v for t in side if (v := t.value(key)) is not None} for side in (a, b))
        if left and right:
            shared = sorted(left.keys() & right.keys())
            x, y = (fmean(side[s] for s in shared or side) for side in (left, right))
            means = fmean(left.values()), fmean(right.values()), y - x, 100 * (y - x) / abs(x) if x else None
            over = f"{len(shared)} shared seeds" if shared else "no shared seed"
            rows.append((key, metrics.get(key).unit, *means, len(left), len(right), over))
    columns = ("metric", "unit", "base", "other", "difference", "%", "n base", "n other", "over")
    return merge(columns, rows, {"difference": "+.5g", "%": "+.2f"})
