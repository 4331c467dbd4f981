# SPDX-License-Identifier: MIT
"""Telemetry read back: raw samples to metrics of a training window, what they show of a trial, hints and a verdict.

A sample stands for the time since the one before it; where that is more than a period and a half there is a gap, and it
stands for one period.  Nothing is filled in: what no sample covers has no value.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby, islice, pairwise
from statistics import fmean, pstdev
from typing import Any, NamedTuple

from ablab import machine, metrics, rundir
from ablab.report.load import Trial
from ablab.report.table import Cell, Table, merge

GB, GIB = 1e-9, 1 / (1 << 30)
GAP = 1.5  # periods
KEYS: dict[str, tuple[str, float]] = {  # metric -> (key of a reading, factor)
    "compute_util_avg": ("busy_pct", 1.0),
    "memory_util_avg": ("mem_busy_pct", 1.0),
    "memory_used_avg_gb": ("used_bytes", GB),
    "memory_total_gb": ("total_bytes", GB),
    "memory_own_gb": ("own_bytes", GB),
    "sm_util_avg": ("sm_pct", 1.0),
    "tensor_util_avg": ("tensor_pct", 1.0),
    "dram_util_avg": ("dram_pct", 1.0),
    "power_w": ("power_w", 1.0),
    "power_limit_w": ("limit_w", 1.0),
    "sm_mhz": ("sm_mhz", 1.0),
    "mem_mhz": ("mem_mhz", 1.0),
    "temp_max_c": ("temp_c", 1.0),
    "shared": ("shared", 1.0),
    "throttle_pct": ("throttle", 100.0),
}
SUMS = {"memory_total_gb", "memory_own_gb", "power_w", "power_limit_w"}
MOST = {"temp_max_c", "shared"}
BRIEF = ("compute_util_avg", "memory_util_avg", "memory_used_avg_gb")
LOW_MEMORY, LOW_BUSY = 20.0, 50.0  # percent
LIMIT, FREE, FULL_BUSY, EXPOSED = 0.6, 0.4, 80.0, 0.2


class Span(NamedTuple):
    """A sample and the time that it stands for, (start, end]."""

    start: float
    end: float
    reading: Mapping[str, Any]


def spans(telemetry: Sequence[Mapping[str, Any]]) -> dict[str, list[Span]]:
    """By device, in the order of the manifest, then `host`; `telemetry` is a header and the samples of an attempt."""
    period_s = telemetry[0]["period_ms"] / 1000 if telemetry else 1.0
    found: dict[str, list[Span]] = {}
    for row in sorted(telemetry[1:], key=lambda r: r["t"]):
        for name, reading in [*row["devices"].items(), *([("host", row["host"])] if row["host"] else [])]:
            before = found.setdefault(name, [])
            t, own_s = row["t"], reading.get("period_s", period_s)
            since = t - before[-1].end if before else own_s
            if name == "host":  # seconds of CPU time since the last sample, whatever lies between
                reading = {**reading, **{k: reading[k] / since for k in reading if k.endswith("cpu_s") and since > 0}}
            before.append(Span(t - (since if since <= GAP * own_s else own_s), t, reading))
    host = found.pop("host", [])
    return {**found, **({"host": host} if host else {})}


def window(telemetry: Sequence[Mapping[str, Any]], rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """gpu/* and host/* of each training window of one attempt.

    `telemetry` is its header and samples, `rows` are its rows of metrics; a window lasts from one row to the next, the
    first from the first sample on.  Returns {axes, m, energy}: energy_j is a difference of hardware `counter`s, or
    `integrated` power.
    """
    found = spans(telemetry)
    host = found.pop("host", [])
    begin = min((s[0].start for s in [*found.values(), host] if s), default=0.0)
    made = []
    for row in sorted(rows, key=lambda r: r["t"]):
        if row["t"] > begin and (found or host):
            each = [_measures(s, begin, row["t"]) for s in found.values()]
            m, counted = _total(each)
            m |= {f"gpu/{i}/{k}": v for i, one in enumerate(each) for k, v in one.items() if k[0] != "_"}
            if each:
                m["gpu/coverage"] = fmean(one["_coverage"] for one in each)
            m |= _host(host, begin, row["t"])
            energy = ("counter" if counted else "integrated") if "gpu/energy_j" in m else None
            made.append({**{a: row[a] for a in metrics.AXES if a in row}, "m": m, "energy": energy})
        begin = max(begin, row["t"])
    return made


def _inside(found: Sequence[Span], begin: float, end: float) -> list[tuple[float, Span]]:
    """(seconds inside, span) of the spans that reach into (begin, end]."""
    inside, at = [], bisect_right(found, begin, key=lambda s: s.end)
    while at < len(found) and found[at].start < end:
        inside.append((min(found[at].end, end) - max(found[at].start, begin), found[at]))
        at += 1
    return inside


def _value(reading: Mapping[str, Any], key: str, factor: float) -> float | None:
    value = reading.get(key)
    return None if value is None else factor * (bool(value) if isinstance(value, list) else value)


def _measures(found: Sequence[Span], begin: float, end: float) -> dict[str, Any]:
    """What one device did in (begin, end], by the last part of the metric; `_coverage` and `_counted` beside it."""
    inside = _inside(found, begin, end)
    m: dict[str, Any] = {"_coverage": sum(s for s, _ in inside) / (end - begin)}
    for name, (key, factor) in KEYS.items():
        values = [(s, v) for s, span in inside if (v := _value(span.reading, key, factor)) is not None]
        if values and name in MOST:
            m[name] = max(v for _, v in values)
        elif values:
            m[name] = sum(s * v for s, v in values) / sum(s for s, _ in values)
    counted, at = None, max(bisect_right(found, begin, key=lambda s: s.end), 1)
    while at < len(found) and (a := found[at - 1]).end < end:
        b, at = found[at], at + 1
        count = [span.reading.get("energy_j") for span in (a, b)]
        if None in count or count[1] < count[0]:  # a counter that went back began anew
            counted = None
            break
        share = (min(b.end, end) - max(a.end, begin)) / (b.end - a.end)
        counted = (counted or 0.0) + share * (count[1] - count[0])
    if counted is not None:
        m["energy_j"] = counted
    elif "power_w" in m:
        m["energy_j"] = sum(s * span.reading.get("power_w", 0.0) for s, span in inside)
    m["_counted"] = counted is not None
    return m


def _total(each: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], bool]:
    """Of all devices together, and whether their energy was counted; what one of them lacks has no total."""
    m: dict[str, float] = {}
    for name in (*KEYS, "energy_j"):
        values = [one[name] for one in each if name in one]
        if values and (len(values) == len(each) or name in MOST):
            join = max if name in MOST else sum if name in SUMS or name == "energy_j" else fmean
            m[f"gpu/{name}"] = join(values)
            if name == "memory_used_avg_gb":
                m["gpu/memory_used_total_gb"] = sum(values)
            if name == "compute_util_avg" and len(values) > 1 and fmean(values):
                m["gpu/load_cv"] = 100 * pstdev(values) / fmean(values)
    return m, all(one["_counted"] for one in each)


def _host(found: Sequence[Span], begin: float, end: float) -> dict[str, float]:
    inside = _inside(found, begin, end)
    m = {"host/coverage": sum(s for s, _ in inside) / (end - begin)} if found else {}
    for name, key, factor in (
        ("cpu_pct", "cpu_s", 100.0),
        ("loader_cpu_pct", "loader_cpu_s", 100.0),
        ("ram_used_gib", "rss_bytes", GIB),
    ):
        values = [(s, factor * span.reading[key]) for s, span in inside if key in span.reading]
        if values:
            m[f"host/{name}"] = sum(s * v for s, v in values) / sum(s for s, _ in values)
    return m


Recorded = list[tuple[list[dict[str, Any]], list[dict[str, Any]]]]
"""Header and samples, and rows of metrics, of each attempt that has telemetry."""


def recorded(trial: Trial) -> Recorded:
    """What a trial left."""
    rows, made = trial.rows(), ((a.number, _samples(a)) for a in trial.dir.attempts())
    return [(samples, [r for r in rows if r["attempt"] == n]) for n, samples in made if len(samples) > 1]


def _samples(attempt: rundir.AttemptDir) -> list[dict[str, Any]]:
    """Header and samples; a line that somebody edited is none."""
    found = rundir.lines(attempt.telemetry, "telemetry")
    return [*islice(found, 1), *filter(_is_sample, found)]


def _is_sample(row: Mapping[str, Any]) -> bool:
    devices, host = row.get("devices"), row.get("host", 0)
    parts = [*devices.values(), {} if host is None else host] if isinstance(devices, dict) else [None]
    return type(row.get("t")) in (int, float) and all(isinstance(part, dict) for part in parts)


def newest(trial: Trial) -> dict[str, list[Span]]:
    """The samples of each device in the newest attempt, in seconds since the first."""
    found = spans(_samples(trial.dir.attempt(trial.attempt)) if trial.attempt else [])
    found.pop("host", None)
    first = min((s[0].end for s in found.values()), default=0.0)
    return {d: [Span(s.start - first, s.end - first, s.reading) for s in mine] for d, mine in found.items()}


def line(found: Sequence[Span], keep: Iterable[int]) -> list[tuple[float, Mapping[str, Any]]]:
    """(seconds, reading) of the samples `keep`; between two of them where others are missing one without readings."""
    made: list[tuple[float, Mapping[str, Any]]] = []
    for before, i in pairwise([None, *keep]):
        if before is not None and any(b.start > a.end + 1e-6 for a, b in pairwise(found[before : i + 1])):
            made.append(((found[before].end + found[i].end) / 2, {}))
        made.append((found[i].end, found[i].reading))
    return made


def mean(trial: Trial, name: str) -> float | None:
    """Time-weighted mean of a metric of KEYS over all samples, None where it was never taken."""
    attempts = [spans(_samples(a)) for a in trial.dir.attempts()]
    devices = list(dict.fromkeys(d for found in attempts for d in found if d != "host"))
    return figures(_joined(attempts, devices, *KEYS[name], fmean))[0] if devices else None


def windows(found: Recorded) -> list[dict[str, Any]]:
    """`window` over all attempts of a trial."""
    return [row for samples, rows in found for row in window(samples, rows)]


def sampled(trial: Trial, found: Recorded) -> float:
    """Share of the time between the first and the last row of each attempt in which every device of the trial was
    sampled; `gpu/coverage` begins with the first sample, so that it cannot tell of a sampler that came late."""
    devices = [d["uuid"] for d in (trial.dir.manifest() or {})["devices"]]
    by_attempt = {rows[0]["attempt"]: spans(samples) for samples, rows in found if rows}
    whole = covered = 0.0
    for number, rows in groupby(trial.rows(), key=lambda r: r["attempt"]):
        times = [r["t"] for r in rows]
        each = by_attempt.get(number, {})
        whole += times[-1] - times[0]
        covered += min(sum(s for s, _ in _inside(each.get(d, ()), times[0], times[-1])) for d in devices)
    return covered / whole if whole else 0.0


# what the verb prints


def table(trials: Iterable[tuple[Trial, Recorded]], full: bool = False) -> Table:
    """Time-weighted mean, quantiles and maximum of all samples, for each trial, device and quantity."""
    rows: list[tuple[Cell, ...]] = []
    for trial, left in trials:
        attempts = [spans(samples) for samples, _ in left]
        for device, quantities in _quantities(attempts, full).items():
            place = (trial.dir.campaign.name, trial.id, device)
            rows += [(*place, name, unit, *figures) for name, unit, figures in quantities]
    columns = ("campaign", "trial", "device", "quantity", "unit", "mean", "median", "p5", "p95", "max")
    return merge(columns, rows, dict.fromkeys(columns[5:], ".4g"))


def _quantities(
    attempts: Sequence[Mapping[str, list[Span]]], full: bool
) -> dict[str, list[tuple[str, str, tuple[float | None, ...]]]]:
    """Device -> (quantity, unit, figures): each device, all together as `total`, and the host."""
    if not attempts:
        return {}
    devices = list(dict.fromkeys(d for found in attempts for d in found if d != "host"))
    found: dict[str, list[tuple[str, str, tuple[float | None, ...]]]] = {}
    names = [*KEYS] if full else BRIEF
    for label, mine in [*((str(i), [d]) for i, d in enumerate(devices)), ("total", devices)]:
        found[label] = []
        for name in names:
            join = max if name in MOST else sum if name in SUMS or name == "memory_used_avg_gb" else fmean
            values = _joined(attempts, mine, *KEYS[name], join)
            if values or name in BRIEF:
                shown = "memory_used_total_gb" if (label, name) == ("total", "memory_used_avg_gb") else name
                found[label].append((f"gpu/{shown}", metrics.get(f"gpu/{shown}").unit, figures(values)))
    host = {"cpu_pct": ("cpu_s", 100.0), "loader_cpu_pct": ("loader_cpu_s", 100.0), "ram_used_gib": ("rss_bytes", GIB)}
    values = {name: _joined(attempts, ["host"], *key, fmean) for name, key in host.items()}
    found["host"] = [(f"host/{n}", metrics.get(f"host/{n}").unit, figures(v)) for n, v in values.items() if v]
    return {device: quantities for device, quantities in found.items() if quantities}


def _joined(
    attempts: Sequence[Mapping[str, list[Span]]],
    devices: Sequence[str],
    key: str,
    factor: float,
    join: Callable[[list[float]], float],
) -> list[tuple[float, float]]:
    """(seconds, value) of the samples that all of the devices have."""
    found = []
    for spans_of in attempts:
        moments: dict[float, list[tuple[float, float]]] = {}
        for span in (s for d in devices for s in spans_of.get(d, ())):
            if (value := _value(span.reading, key, factor)) is not None:
                moments.setdefault(span.end, []).append((span.end - span.start, value))
        full = (m for m in moments.values() if len(m) == len(devices))
        found += [(fmean(s for s, _ in m), join([v for _, v in m])) for m in full]
    return found


def figures(values: Sequence[tuple[float, float]]) -> tuple[float | None, ...]:
    """Mean, median, 5 and 95 % quantile, maximum of (weight, value); all None where there is none."""
    if not values:
        return (None,) * 5
    whole, ordered = sum(w for w, _ in values), sorted((v, w) for w, v in values)

    def quantile(share: float) -> float:
        left = share * whole
        for value, weight in ordered:
            left -= weight
            if left <= 0:
                return value
        return ordered[-1][0]

    mean = sum(w * v for w, v in values) / whole
    return (mean, quantile(0.5), quantile(0.05), quantile(0.95), ordered[-1][0])


# what it means


def remarks(trial: Trial, left: Recorded, full: bool = False) -> dict[str, Any]:
    """{trial, devices, coverage, energy, throttle, hints, verdict}: what the samples of a trial say beyond numbers."""
    attempts, done, rows = [spans(samples) for samples, _ in left], windows(left), trial.rows()
    manifest = trial.manifest
    names = {d["uuid"]: d["name"] for d in manifest.get("devices", ())}
    devices = list(dict.fromkeys(d for found in attempts for d in found if d != "host"))
    of = lambda name: figures(_joined(attempts, devices, *KEYS[name], fmean))[0] if devices else None
    busy, memory = of("compute_util_avg"), of("memory_util_avg")
    shared = [d for d in devices if any(s.reading.get("shared") for found in attempts for s in found.get(d, ()))]
    counted = [r["m"]["gpu/energy_j"] for r in done if "gpu/energy_j" in r["m"]]
    kind = "counter" if all(r["energy"] == "counter" for r in done if r["energy"]) else "integrated power"
    found: dict[str, Any] = {
        "trial": trial.id,
        "devices": [f"{i} {names.get(d, 'device')} {d}" for i, d in enumerate(devices)],
        "coverage": fmean(c) if (c := [r["m"]["gpu/coverage"] for r in done if "gpu/coverage" in r["m"]]) else None,
        "hints": hints(busy, memory, rows),
        "verdict": verdict(busy, of("dram_util_avg"), rows, manifest, of("power_limit_w")),
    }
    if shared:
        found["shared"] = f"a foreign process used {' '.join(shared)}: no claim of speed or memory can rest on this"
    if full:
        found["energy"] = f"{sum(counted):.4g} J by {kind}" if counted else None
        found["throttle"] = {name: share for name in _reasons(attempts) if (share := _share(attempts, devices, name))}
    return found


def _reasons(attempts: Sequence[Mapping[str, list[Span]]]) -> list[str]:
    readings = (s.reading for found in attempts for spans_of in found.values() for s in spans_of)
    return sorted({reason for r in readings for reason in r.get("throttle", ())})


def _share(attempts: Sequence[Mapping[str, list[Span]]], devices: Sequence[str], reason: str) -> float:
    """Percent of the sampled time with a throttle reason, over all devices."""
    found = [s for a in attempts for d in devices for s in a.get(d, ()) if "throttle" in s.reading]
    hits = sum(s.end - s.start for s in found if reason in s.reading["throttle"])
    return 100 * hits / sum(s.end - s.start for s in found)


def hints(busy: float | None, memory: float | None, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a low number means and what it does not."""
    found = []
    if memory is not None and memory < LOW_MEMORY:
        found.append(
            f"low memory activity: gpu/memory_util_avg {memory:.3g} % < {LOW_MEMORY:.0f} %: the memory controller was"
            " active in this share of the time, so bandwidth is no limit; it is neither GB in use nor allocation"
        )
    if busy is not None and busy < LOW_BUSY:
        data, other = (_share_of(rows, names) for names in (("data",), ("eval", "checkpoint", "prune", "other")))
        known = f"waiting for data {data:.0f} %, evaluation, checkpoints and the rest {other:.0f} %" if rows else ""
        gap = f"{known}, host gap at most {max(0.0, 100 - busy - data):.0f} %" if rows else "no rows to tell why"
        found.append(
            f"low busy time: gpu/compute_util_avg {busy:.3g} % < {LOW_BUSY:.0f} %: any kernel ran in this share of the"
            f" time; {gap}, waiting for other devices not measured; 100 % would be no praise"
        )
    return found


def _share_of(rows: Sequence[Mapping[str, Any]], clocks: Sequence[str]) -> float:
    """Percent of all clocks that these took."""
    spent = {n: sum(r["m"].get(f"time/{n}_s") or 0.0 for r in rows) for n in (*clocks, *("startup", "compile"))}
    whole = sum(v or 0.0 for r in rows for n, v in r["m"].items() if n.startswith("time/") and n.endswith("_s"))
    whole -= sum(r["m"].get("time/epoch_s") or 0.0 for r in rows)
    return 100 * sum(spent[n] for n in clocks) / whole if whole else 0.0


def verdict(
    busy: float | None,
    dram: float | None,
    rows: Sequence[Mapping[str, Any]],
    manifest: Mapping[str, Any],
    cap_w: float | None,
) -> str:
    """What limits a trial, with the numbers: the first limit that fits.

    A bound from below on memory traffic can show that bandwidth limits, never that it does not.
    """
    if busy is None:
        return "undetermined: no device was sampled"
    peak, source = peaks(manifest, cap_w)
    last = rows[-1] if rows else {"train_s": 0.0}
    half = manifest.get("resolved", {}).get("amp") == "bf16"
    rate = last["flops"] / last["train_s"] if last["train_s"] else None
    compute = rate / (1e12 * (peak.bf16 if half else peak.fp32)) if rate and peak else None
    world, at_least = manifest.get("batch", {}).get("world", 1), ""
    traffic = None if dram is None else dram / 100
    if traffic is None and peak and last["train_s"] and (size := _traffic(rows, manifest)):
        traffic, at_least = size * last["step"] / last["train_s"] / (1e9 * peak.gbs), "at least "
    facts = [f"busy {busy:.0f} %", "one process" if world == 1 else "exposed communication not measured"]
    facts.append("FLOP/s unknown" if compute is None else f"{rate / 1e12:.4g} TFLOP/s, {100 * compute:.0f} % of peak")
    facts.append("DRAM unknown" if traffic is None else f"DRAM {at_least}{100 * traffic:.0f} %")
    text = f"{', '.join(facts)}; peaks: {source}"
    if busy < LOW_BUSY:
        return f"input-or-host-limited: {text}"
    if compute is not None and compute >= LIMIT:
        return f"compute-limited: {text}"
    if traffic is not None and traffic >= LIMIT:
        return f"bandwidth-limited: {text}"
    low = compute is not None and compute < FREE and traffic is not None and traffic < FREE and not at_least
    return f"{'latency-limited' if busy >= FULL_BUSY and low else 'undetermined'}: {text}"


def _traffic(rows: Sequence[Mapping[str, Any]], manifest: Mapping[str, Any]) -> float | None:
    """Bytes that a step must move at least: weights are read twice and gradients written in each micro batch, then the
    update reads weights, gradients and state and writes weights and state."""
    found = {k: v for r in rows for k, v in r["m"].items() if k.startswith("memory/") and v}
    w, g, s = (found.get(f"memory/{k}_gib") for k in ("weights", "grads", "optimizer"))
    if w is None:
        return None
    return (manifest["batch"]["accum"] * (2 * w + (g or w)) + 2 * w + (g or w) + 2 * (s or 0.0)) / GIB


def peaks(manifest: Mapping[str, Any], cap_w: float | None) -> tuple[machine.Gpu | None, str]:
    """Peaks of the device of a trial, and where they come from: measured here, else the datasheet."""
    if not (devices := manifest.get("devices")):
        return None, "no device"
    name, driver = devices[0]["name"], manifest["software"].get("driver")
    if found := machine.benched(name, driver, cap_w):
        return found, "measured by ablab machine bench"
    found = machine.listed(name)
    return found, machine.CATALOGUE if found else f"{name} is in no catalogue; ablab machine bench measures it"


def text(found: Mapping[str, Any]) -> str:
    """`remarks` as lines."""
    lines = [f"{found['trial']}: device {d}" for d in found["devices"]] or [f"{found['trial']}: no device was sampled"]
    lines += [f"  coverage {found['coverage']:.2f}"] if found["coverage"] is not None else []
    lines += [f"  energy {found['energy']}"] if found.get("energy") else []
    lines += [f"  throttled by {name} {share:.1f} % of the time" for name, share in found.get("throttle", {}).items()]
    lines += [f"  {found['shared']}"] if "shared" in found else []
    lines += [f"  hint: {hint}" for hint in found["hints"]]
    return "\n".join([*lines, f"  verdict: {found['verdict']}"])
