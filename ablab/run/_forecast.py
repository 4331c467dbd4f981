# SPDX-License-Identifier: MIT
"""Forecasts, which a child with torch makes: kept for the next plan, and scored by the trials that finish.

A forecast is {mem_gib, hours, items, steps}, low / likely / high; hours is None where no peak is known.  Once enough
trials have finished on a device, low / likely / high are where 10, 50 and 90 % of them would have been, and `raw` is
what was likely without them.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from statistics import NormalDist, fmean, median, stdev
from typing import Any

from ablab import machine, provenance, rundir
from ablab.journal import Journal
from ablab.plan import Plan
from ablab.rundir import RunError, TrialDir

Made = Mapping[str, Mapping[str, Any]]
"""Group of a trial -> its forecast."""
ACTUAL = {"mem_gib": "memory", "hours": "time"}
"""What is forecast, in the order of `actual`."""
COSTS = {"cost": ("cost", "by SYS_PRICE_PER_HOUR"), "kwh": ("energy", "kWh at the board's full power")}
GIB = 1 << 30
LEAST = 4  # configurations that must have finished on a device before they set the band
SIDE = NormalDist().inv_cdf(0.9)
NARROW = 0.02  # half a band in logarithms: trials that were all alike do not promise more
CHECKPOINT = ("weights", "optimizer", "masks")
KEPT = ("TRAIN_CKPT_KEEP", "TRAIN_CKPT_TOP", "TRAIN_CKPT_BEST")
_here = cache(machine.inventory)  # on a GPU it asks a tool, which takes its time


def known(results: Path, on: str = "") -> Made:
    """Forecasts that this code has made on this machine, fitted to what is known of the device `on`."""
    return fitted(_read(rundir.forecasts(results), "forecasts"), band(results, on))


def decided(results: Path) -> Made:
    """What a GPU of this machine has decided under this code, by `Plan.measure`."""
    return _read(rundir.measured(results), "measured")


def decide(results: Path, name: str, found: Mapping[str, Any]) -> None:
    """Remember what it decided for a plan."""
    _write(rundir.measured(results), "measured", {**decided(results), name: found})


def keep(results: Path, made: Made, on: str = "") -> Made:
    """Remember forecasts as they were made; returns them and those known before, fitted.  One whose length data has yet
    to tell is not kept."""
    before = _read(rundir.forecasts(results), "forecasts")
    lasting = {group: f for group, f in made.items() if f["hours"] or f["steps"]}
    if lasting:
        _write(rundir.forecasts(results), "forecasts", {**before, **lasting})
    return fitted({**before, **made}, band(results, on))


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


def device(plan: Plan, gpu: str | None = None) -> str:
    """What scores call the device that a plan runs on, or the GPU of a user's name.  Raises ValueError."""
    gpus = _here().devices if plan.trials[0].values["SYS_DEVICE_CUDA"] else ()
    return machine.named(gpu) if gpu else machine.kind(gpus[0].name) if gpus else _here().cpu


def band(results: Path, on: str) -> dict[str, list[float]] | None:
    """{mem_gib, hours}: low, likely and high as factors on what a forecast calls likely, from the trials that finished
    on a device; None before LEAST configurations have.

    The interval in which the next one lies with 80 %, log-normal, its width by Student's t: few trials make it wide.
    """
    found: dict[str, list[float]] = {}
    for place, key in enumerate(ACTUAL):
        ratios: dict[str, list[float]] = {}
        for row in _scores(results, on):
            likely = row["raw"][place] if "raw" in row else row[key] and row[key][1]
            if likely:
                ratios.setdefault(row.get("group") or row["trial"], []).append(row["actual"][place] / likely)
        logs = [math.log(median(r)) for r in ratios.values()]
        if len(logs) >= LEAST:
            half = max(NARROW, _t(len(logs) - 1) * stdev(logs) * math.sqrt(1 + 1 / len(logs)))
            found[key] = [math.exp(fmean(logs) + side * half) for side in (-1, 0, 1)]
    return found or None


def _t(free: int) -> float:
    """The 90 % point of Student's t, by the expansion of Cornish and Fisher."""
    z = SIDE
    return z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)


def fitted(made: Made, factors: Mapping[str, Sequence[float]] | None) -> Made:
    """Forecasts in the light of a `band`."""
    if not factors:
        return made
    found = {}
    for group, f in made.items():
        exact = sum(f["items"].get(k, 0) for k in (*CHECKPOINT, "gradients")) / GIB
        raw = [f["mem_gib"][1], f["hours"][1] if f["hours"] else None]
        there = [(i, k) for i, k in enumerate(ACTUAL) if k in factors and raw[i]]
        new = {k: machine.banded(raw[i], factors[k], exact * (k == "mem_gib")) for i, k in there}
        found[group] = {**f, **new, "raw": raw}
    return found


def oversize(plan: Plan, made: Made) -> dict[str, str]:
    """Trial -> why not even the low estimate fits here."""
    cuda = plan.trials[0].values["SYS_DEVICE_CUDA"]
    rooms = [d.memory_bytes for d in _here().devices] if cuda else [_here().memory_bytes]
    return {t.id: why for t in plan.trials if t.group in made and (why := beyond(made[t.group], rooms))}


def beyond(found: Mapping[str, Any], rooms: Sequence[int]) -> str | None:
    """Why a forecast fits into none of these memories, or None."""
    room = machine.USABLE * max(rooms, default=0) / GIB
    low = found["mem_gib"][0]
    return f"needs {low:.2f} GiB at the very least, {room:.2f} are there" if rooms and low > room else None


def of(plan: Plan, made: Made, results: Path, gpu: str | None = None, count: int = 1) -> dict[str, Any]:
    """{missing, of, jobs, mem_gib, hours, cost, kwh, disk_gib, past}: the largest memory, the time of all trials here
    or on `count` GPUs of a name, what that costs, how earlier ones fared.  Cost is None without a price, kWh without a
    listed GPU."""
    groups, values = {t.group for t in plan.trials}, plan.trials[0].values
    found = [made[t.group] for t in plan.trials if t.group in made]
    devices = (
        [machine.named(gpu)] * count if gpu else [d.name for d in _here().devices] if values["SYS_DEVICE_CUDA"] else []
    )
    jobs = min(plan.settings.jobs or len(devices) or 1, len(plan.trials))
    whole = len(found) == len(plan.trials)
    timed = whole and all(f["hours"] for f in found)
    hours = [sum(side) for side in zip(*(f["hours"] for f in found), strict=True)] if timed else None
    listed, price = machine.listed(devices[0]) if devices else None, values["SYS_PRICE_PER_HOUR"]
    return {
        "missing": len(groups - made.keys()),
        "of": len(groups),
        "jobs": jobs,
        "mem_gib": max(f["mem_gib"] for f in found) if whole else None,
        "hours": [h / jobs for h in hours] if hours else None,
        "cost": [h * price for h in hours] if hours and price else None,
        "kwh": [h * listed.watts / 1000 for h in hours] if hours and listed else None,
        "disk_gib": sum(map(_disk_gib, plan.trials, found)) if whole else None,
        "past": past(results, device(plan, gpu)),
    }


def _disk_gib(trial: Any, found: Mapping[str, Any]) -> float:
    """Of the checkpoints that a trial keeps, and the one that is being written."""
    kept = 1 + sum(int(trial.values[k]) for k in KEPT)
    return kept * sum(found["items"].get(k, 0) for k in CHECKPOINT) / GIB


def lines(found: Mapping[str, Any], trials: int) -> list[str]:
    """What `of` found, as text."""
    if found["missing"]:
        text = [f"not made for {found['missing']} of {found['of']} configurations; make estimate"]
    else:
        how = f"{found['jobs']} at once" if found["jobs"] > 1 else "one after another"
        time = span(found["hours"]) if found["hours"] else "unknown"
        memory = " / ".join(f"{gib:.2f}" for gib in found["mem_gib"])
        text = [f"time {time}, {trials} trials {how}; memory {memory} GiB, the largest (low / likely / high)"]
        known = {k: " / ".join(f"{x:.3g}" for x in found[k]) for k in COSTS if found[k]}
        price = [f"{COSTS[k][0]} {numbers} {COSTS[k][1]}" for k, numbers in known.items()]
        text.append("; ".join([*price, f"disk {found['disk_gib']:.2f} GiB of checkpoints"]))
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
        raw = {"raw": found["raw"]} if "raw" in found else {}
        rows.line(line | {k: found.get(k) for k in (*ACTUAL, "actual")} | raw | {"group": manifest["trial"]["group"]})
        rows.close()


def past(results: Path, on: str) -> dict[str, Any] | None:
    """{trials, of: {memory, time: {error, hit}}} over all that finished on a device or CPU of this name: the median
    of |likely / actual - 1|, and the share of actual values from low to high."""
    rows = _scores(results, on)
    found = {}
    for place, (key, kind) in enumerate(ACTUAL.items()):
        pairs = [(row[key], row["actual"][place]) for row in rows if row[key]]
        if pairs:
            hits = [low <= real <= high for (low, _, high), real in pairs]
            error = median(abs(likely / real - 1) for (_, likely, _), real in pairs)
            found[kind] = {"error": error, "hit": sum(hits) / len(hits)}
    return {"trials": len(rows), "of": found} if rows else None


def _scores(results: Path, on: str) -> list[dict[str, Any]]:
    return [row for row in rundir.scores(results) if machine.kind(row["on"]) == machine.kind(on)]


def _machine() -> str:
    here = _here()
    return ", ".join([here.cpu, f"{len(here.cores)} cores", *(d.name for d in here.devices)])
