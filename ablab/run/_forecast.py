# SPDX-License-Identifier: MIT
"""Forecasts, which a child with torch makes: kept for the next plan, and scored by the trials that finish.

A forecast is {mem_gib, hours, items, steps}, low / likely / high; hours is None where no peak is known.
"""

from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from ablab import machine, provenance, rundir
from ablab.journal import Journal
from ablab.plan import Plan
from ablab.rundir import RunError, TrialDir

Made = Mapping[str, Mapping[str, Any]]
"""Group of a trial -> its forecast."""
ACTUAL = {"mem_gib": "memory", "hours": "time"}
"""What is forecast, in the order of `actual`."""
GIB = 1 << 30
_here = cache(machine.inventory)  # on a GPU it asks a tool, which takes its time


def known(results: Path) -> Made:
    """Forecasts that this code has made on this machine."""
    return _read(rundir.forecasts(results), "forecasts")


def decided(results: Path) -> Made:
    """What a GPU of this machine has decided under this code, by `Plan.measure`."""
    return _read(rundir.measured(results), "measured")


def decide(results: Path, name: str, found: Mapping[str, Any]) -> None:
    """Remember what it decided for a plan."""
    _write(rundir.measured(results), "measured", {**decided(results), name: found})


def keep(results: Path, made: Made) -> Made:
    """Remember forecasts; returns them and those known before.  One whose length data has yet to tell is not kept."""
    before = known(results)
    lasting = {group: f for group, f in made.items() if f["hours"] or f["steps"]}
    if lasting:
        _write(rundir.forecasts(results), "forecasts", {**before, **lasting})
    return {**before, **made}


def _read(path: Path, kind: str) -> Made:
    with suppress(RunError, OSError):  # it is a cache: whatever is wrong with it, it is made again
        found = rundir.read_json(path, kind)
        if (found["tree"], found["machine"]) == (provenance.tree(), _machine()):
            return found["made"]
    return {}


def _write(path: Path, kind: str, made: Made) -> None:
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        rundir.write_json(path, kind, {"tree": provenance.tree(), "machine": _machine(), "made": made})


def of(plan: Plan, made: Made, results: Path) -> dict[str, Any]:
    """{missing, of, jobs, mem_gib, hours, past}: the largest memory, the time of all trials, how earlier ones fared."""
    groups = {t.group for t in plan.trials}
    found = [made[t.group] for t in plan.trials if t.group in made]
    gpus = [d.name for d in _here().devices] if plan.trials[0].values["SYS_DEVICE_CUDA"] else []
    jobs = min(plan.settings.jobs or len(gpus) or 1, len(plan.trials))
    whole = len(found) == len(plan.trials)
    timed = whole and all(f["hours"] for f in found)
    return {
        "missing": len(groups - made.keys()),
        "of": len(groups),
        "jobs": jobs,
        "mem_gib": max(f["mem_gib"] for f in found) if whole else None,
        "hours": [sum(side) / jobs for side in zip(*(f["hours"] for f in found), strict=True)] if timed else None,
        "past": past(results, gpus[0] if gpus else _here().cpu),
    }


def lines(found: Mapping[str, Any], trials: int) -> list[str]:
    """What `of` found, as text."""
    if found["missing"]:
        text = [f"not made for {found['missing']} of {found['of']} configurations; make estimate"]
    else:
        how = f"{found['jobs']} at once" if found["jobs"] > 1 else "one after another"
        time = span(found["hours"]) if found["hours"] else "unknown"
        memory = " / ".join(f"{gib:.2f}" for gib in found["mem_gib"])
        text = [f"time {time}, {trials} trials {how}; memory {memory} GiB, the largest (low / likely / high)"]
    if past := found["past"]:
        scores = (f"{kind} {100 * s['error']:.0f} % off, {100 * s['hit']:.0f} % in" for kind, s in past["of"].items())
        text.append(f"past: {past['trials']} trials here, median error and share inside the band: {'; '.join(scores)}")
    return text


def table(plan: Plan, made: Made, fits: Mapping[str, str]) -> str:
    """A line for each configuration, as `make estimate` prints them; `fits` says what a GPU makes of its memory."""
    text, seeds = [], {}
    for t in plan.trials:
        seeds.setdefault(t.group, []).append(t.id)
    for group, ids in seeds.items():
        if f := made.get(group):
            memory = " / ".join(f"{gib:.2f}" for gib in f["mem_gib"])
            items = ", ".join(f"{k} {n / GIB:.2f}" for k, n in sorted(f["items"].items(), key=lambda i: -i[1])[:3])
            time = span(f["hours"]) if f["hours"] else "unknown"
            head = f"{ids[0]} x {len(ids)}: memory {fits.get(group) or memory + ' GiB'} ({items})"
            text.append(f"{head}; time {time}; {f['steps'] or '?'} steps")
    return "\n".join([*text, "low / likely / high; weights, gradients and optimizer are exact, the rest is estimated"])


def span(hours: list[float]) -> str:
    """Low / likely / high in the unit that suits them."""
    most = max(hours)
    factor, unit = (3600, "s") if most < 1 / 30 else (60, "min") if most < 2 else (1, "h")
    return " / ".join(f"{factor * h:.1f}" for h in hours) + f" {unit}"


def score(trial: TrialDir, attempt: int) -> None:
    """Append forecast and actual of a finished trial to the campaign's forecast.jsonl."""
    summary, manifest = trial.summary() or {}, trial.manifest()
    if not (found := summary.get("forecast")) or not manifest:
        return
    names = [d["name"] for d in manifest["devices"]] or [manifest["cpu"]["model"]]
    line = {"trial": trial.name, "attempt": attempt, "on": names[0]}
    with Journal.of(trial.campaign).exclusive():  # several runners may share the file
        rows = rundir.Rows(trial.campaign.forecast, "forecast", {"campaign": trial.campaign.name})
        rows.line(line | {k: found.get(k) for k in (*ACTUAL, "actual")})
        rows.close()


def past(results: Path, on: str) -> dict[str, Any] | None:
    """{trials, of: {memory, time: {error, hit}}} over all that finished on a device or CPU of this name: the median
    of |likely / actual - 1|, and the share of actual values from low to high."""
    rows = [row for row in rundir.scores(results) if row["on"] == on]
    found = {}
    for place, (key, kind) in enumerate(ACTUAL.items()):
        pairs = [(row[key], row["actual"][place]) for row in rows if row[key]]
        if pairs:
            hits = [low <= real <= high for (low, _, high), real in pairs]
            error = median(abs(likely / real - 1) for (_, likely, _), real in pairs)
            found[kind] = {"error": error, "hit": sum(hits) / len(hits)}
    return {"trials": len(rows), "of": found} if rows else None


def _machine() -> str:
    here = _here()
    return ", ".join([here.cpu, f"{len(here.cores)} cores", *(d.name for d in here.devices)])
