# SPDX-License-Identifier: MIT
"""report.html and a page for each trial: what they show of a campaign, and which of them have to be written."""

import hashlib
import json
import multiprocessing
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from ablab import kconf, machine, plan, rundir
from ablab.report import compare, gpu, lens, page
from ablab.report.blocks import (
    POINTS,
    Model,
    assets,
    band,
    curve_block,
    document,
    items,
    section,
    six,
    table,
    text,
    thin,
    unit,
)
from ablab.report.load import Arm, Loaded, Trial
from ablab.report.plots.budget_lenses import WORDS
from ablab.report.stats import Verdict
from ablab.report.table import line, merge, shown

BUDGET = 60_000  # points of all curves of report.html
PAGE_BYTES = 60_000  # of a trial page
LOG_LINES, LOG_BYTES = 60, 8_000
FIRST = ("val_loss", "train_loss", "learning_rate", "grad_norm", "sparsity", "train/tok_per_sec", "train/mfu")
FEW = 300  # trials up to which report.html has curves of more than the metric of the campaign
READINGS = {"busy_pct": "% of time", "mem_busy_pct": "% of time", "power_w": "W", "temp_c": "C", "used_bytes": "bytes"}


def build(c: Loaded, verdicts: Sequence[Verdict], figures: Sequence[str]) -> list[Path]:
    """Write report.html and trials/<id>.html; returns what was written, which leaves out what had not changed."""
    folder = c.dir.report / "trials"
    folder.mkdir(parents=True, exist_ok=True)
    if len(c.trials) > FEW:
        context = multiprocessing.get_context("fork")  # which hands the campaign over as it is
        with ProcessPoolExecutor(len(machine.cores()), context, _share, (c,)) as pool:
            written = [p for found in pool.map(_numbered, range(len(c.trials)), chunksize=16) for p in found]
    else:
        base = base_values(c)
        written = [p for t in c.trials for p in _page(c, t, base)]
    known = {t.id for t in c.trials}
    for path in folder.glob("*.html"):
        if path.stem not in known:
            path.unlink()
    data = document(f"{c.name}: report", campaign_model(c, verdicts, figures)).encode()
    return written + _write(c.dir.report / "report.html", data)


_shared: list[tuple[Loaded, Mapping[str, str]]] = []


def _share(c: Loaded) -> None:
    _shared.append((c, base_values(c)))


def _numbered(i: int) -> list[Path]:
    c, base = _shared[0]
    return _page(c, c.trials[i], base)


def _page(c: Loaded, t: Trial, base: Mapping[str, str]) -> list[Path]:
    """Write the page of a trial, unless it is there."""
    path = c.dir.report / "trials" / f"{rundir.checked(t.id)}.html"
    mark = f'<meta name="ablab-inputs" content="{_state(c, t)}">'
    if t.is_done and _is_of(path, mark.encode()):
        return []
    for points in (POINTS, 200, 100, 50, 20):
        data = document(f"{t.id} of {c.name}", trial_model(c, t, base, points), mark).encode()
        if len(data) <= PAGE_BYTES:
            break
    return _write(path, data)


def _write(path: Path, data: bytes) -> list[Path]:
    if path.exists() and path.read_bytes() == data:
        return []
    # no sync, unlike results: 5,000 pages would take a minute, and one that a crash tears is written again
    aside = path.with_suffix(".new")
    aside.write_bytes(data)
    aside.replace(path)
    return [path]


def _is_of(path: Path, mark: bytes) -> bool:
    """Whether a whole page with this mark is there."""
    data = path.read_bytes() if path.exists() else b""
    return mark in data[:2000] and data.endswith(b"</html>\n")


def _state(c: Loaded, t: Trial) -> str:
    """Hash of all that the page of a done trial depends on: its DONE, the campaign's plan, and this code."""
    done = rundir.stamp(t.dir.file("done"))["sha256"] if t.is_done else ""
    return hashlib.sha256(f"{done} {c.dir.hash} {c.certified} {_code()}".encode()).hexdigest()


@cache
def _code() -> str:
    """Hash of what makes pages."""
    sources = (Path(__file__).with_name(f"{name}.py").read_text() for name in ("web", "blocks", "gpu", "page"))
    return hashlib.sha256("".join([*sources, *assets()]).encode()).hexdigest()


# The campaign


def campaign_model(c: Loaded, verdicts: Sequence[Verdict], figures: Sequence[str]) -> Model:
    """What report.html shows."""
    question, placebo = c.registered["question"], page.placebo_tests(c)
    lost = [t for t in c.trials if t.value(c.key, c.mode) is None]
    keys = [c.key] if len(c.trials) > FEW else list(dict.fromkeys([c.key, *FIRST]))
    configs = config_block(c)
    arms = table(page.arm_table(c), filter=True, name="arms")
    return {
        "title": c.name,
        "banners": page.banners(c, placebo),
        "lead": line(question) if question else "No question was registered.",
        "facts": [line(fact) for fact in page.facts(c)],
        "sections": [
            section("Verdicts", forest(c, verdicts), None if verdicts else text("Nothing is compared here.")),
            section("Arms", text(f"{c.what}. Only done trials count; sd, min, max: over seeds."), arms),
            section("Curves", curves(list(c.arms.values()), keys) or text("None: no trial is done.")),
            section("Lenses", *lenses(c)),
            section(
                "Trials",
                text("All of the plan. A mean in a group line is over all its done trials, shown or not."),
                trial_block(c),
            ),
            section("Without a result", _lost(c, lost)),
            section("Contracts", *_contracts(c)),
            section("Confounders", items(confounders(c))),
            section("Not tested", items(page.untested(c, verdicts, placebo))),
            section("Forecast against actual", _forecasts(c)),
            section("Configuration", configs),
            section("Methods", items(page.methods(c))),
            section(
                "Reproduction",
                {"type": "code", "text": "\n".join(page.commands(c))},
                text(f"Inputs {c.inputs()}"),
                {"type": "links", "links": _links(figures)},
            ),
        ],
    }


def _links(figures: Sequence[str]) -> list[list[str]]:
    names = ["report.md", "table.csv", "base.config"]
    return [[name, name] for name in [*names, *(f"{f}.{kind}" for f in figures for kind in ("png", "svg", "csv"))]]


def forest(c: Loaded, verdicts: Sequence[Verdict]) -> Model | None:
    """Verdicts with their effects on one scale."""
    rows = []
    for (left, right, _), v in zip(c.pairs(), verdicts, strict=True):
        ids = [t.id for arm in (left, right) for t in arm.trials if t.value(c.key, c.mode) is not None]
        rows.append(
            {
                "label": line(v.contrast.label),
                "title": line(v.contrast.title),
                "effect": v.effect,
                "percent": v.percent,
                "interval": v.interval,
                "n": v.n,
                "p": v.p,
                "family": v.p_family,
                "word": v.word,
                "note": line(v.note),
                "trials": ids,
            }
        )
    facts = {"unit": f"difference of {c.key} ({c.metric.unit})", "margin": c.registered["margin"]}
    return {"type": "forest", **facts, "better": c.metric.better, "rows": rows} if rows else None


def trial_block(c: Loaded) -> Model:
    """Every trial of the plan, with what a reader sorts and groups by."""
    symbols = list(dict.fromkeys(n for t in c.trials for n, _ in _overrides(t)))
    base = base_values(c)
    rows = []
    for t in c.trials:
        set_here, s = dict(_overrides(t)), t.summary
        cost = (s["used"]["total_s"], s["perf"]["tok_per_s"], s["perf"]["peak_mem_bytes"] / 2**30) if s else (None,) * 3
        point = [set_here.get(n, base.get(n, "")).strip('"') for n in symbols]
        arm = plan.arm_text(t.record["step"], t.record["axes"]) or "base"
        rows.append([t.id, arm, t.seed, t.state, t.value(c.key, c.mode), *cost, t.attempt, t.record["step"], *point])
    metric = f"{c.key} {c.mode}"
    head = ("trial", "arm", "seed", "state", metric, "total s", "tok/s", "peak GiB", "attempts", "step", *symbols)
    formats = {metric: "#.6g", "total s": ",.1f", "tok/s": ",.0f", "peak GiB": ".3f"}
    found = merge(head, rows, formats)
    extra = {"filter": True, "group": ["arm", "state", "step", *symbols], "mean": metric, "link": "trials/"}
    return table(found, name="trials", hide=["step", *symbols], **extra)


def _overrides(t: Trial) -> Iterable[tuple[str, str]]:
    for change in t.record["overrides"]:
        name, _, value = change.removeprefix("CONFIG_").partition("=")
        yield name, value


def base_values(c: Loaded) -> dict[str, str]:
    """Symbol -> literal of the frozen base."""
    return {r.name: r.text for r in kconf.lex(Path(), c.content["base"]["config"]).requests if r.name}


def _lost(c: Loaded, lost: Sequence[Trial]) -> Model:
    if not lost:
        return text("None: every trial of the plan is done.")
    rows = []
    for t in lost:
        evidence = last_line(t) if t.is_lost else ""
        rows.append((t.id, "no value" if t.is_done else t.state, t.attempt, page.reason(c, t), evidence, t.place))
    head = ("trial", "state", "attempts", "reason", "last line of the log", "path")
    return table(merge(head, rows), name="lost", link="trials/", wrap=True)


def _contracts(c: Loaded) -> Iterable[Model]:
    """How many trials kept each contract, and every breach."""
    kept: dict[str, list[int]] = {}
    breaches = []
    for t in c.trials:
        for made in contracts(t):
            count = kept.setdefault(made["name"], [0, 0])
            count[not made["ok"]] += 1
            if not made["ok"]:
                breaches.append(
                    (t.id, made["name"], brief(made["expected"]), brief(made["measured"]), made.get("step"))
                )
    if breaches:
        yield table(merge(("trial", "contract", "expected", "measured", "step"), breaches), link="trials/", wrap=True)
    rows = [(name, *count) for name, count in sorted(kept.items())]
    yield (
        table(merge(("contract", "kept in trials", "broken in"), rows)) if rows else text("No trial has recorded any.")
    )


def contracts(t: Trial) -> list[Mapping[str, Any]]:
    """The last judgement of each contract in the newest attempt."""
    if t.summary is not None:
        return list(t.summary["contracts"])
    found = list(rundir.lines(t.dir.attempt(t.attempt).contracts, "contracts"))[1:] if t.attempt else []
    return list({made["name"]: made for made in found}.values())


def brief(value: Any) -> str:
    """Any value as a short text, hashes cut."""
    words = value if isinstance(value, str) else json.dumps(value)
    words = compare.HASH.sub(lambda m: m[0][:12], words)
    return line(words if len(words) <= 80 else words[:78] + "..")


def confounders(c: Loaded) -> list[str]:
    """What differs between compared arms and nobody declared, and what disturbed the campaign."""
    found = []
    for left, right, _ in c.pairs():
        what = compare.undeclared(compare.differences(right.trials, left.trials))
        found += [f"{left.label} - {right.label}: {text}" for text in what]
    again = [t.id for t in c.trials if t.attempt > 1]
    found += [f"more than one attempt: {', '.join(again)}"] if again else []
    checked = "symbols, batch, budget, data, execution, software, hardware and sources of all compared arms"
    return found or [f"None found in {checked}."]


def _forecasts(c: Loaded) -> Model:
    rows, inside = [], 0
    for t in c.trials:
        said = t.summary.get("forecast") if t.summary else None
        if said and said.get("hours") and said.get("actual"):
            memory, hours, (used, took) = said["mem_gib"], said["hours"], said["actual"]
            inside += hours[0] <= took <= hours[2]
            rows.append((t.id, *(60 * h for h in hours), 60 * took, *memory, used))
    head = ("trial", "low min", "likely min", "high min", "actual min", "low GiB", "likely GiB", "high GiB", "peak GiB")
    if not rows:
        return text("No done trial has a forecast.")
    return table(
        merge(head, rows, dict.fromkeys(head[1:], ".3g")),
        name="forecasts",
        filter=True,
        note=f"{inside} of {len(rows)} took a time inside the interval that was forecast.",
    )


def lenses(c: Loaded) -> Iterable[Model]:
    """The arms at the largest value of each budget that all of them reached."""
    rows, flips = [], []
    for found in lens.lenses(c):
        flips += [f"equal {WORDS[found.name]}: {left} and {right} change places" for left, right in found.flips]
        for arm, p in found.arms.items():
            place = f"{WORDS[found.name]} {found.at:.4g} {found.unit}"
            rows.append(
                (place, arm or "base", p.n, p.value, p.rank, p.registered, "mid-schedule" if p.mid_schedule else "")
            )
    if not rows:
        yield text("Fewer than two arms have a result.")
        return
    yield text(
        "The same trials at other budgets, each at the largest amount that all reached. The registered one decides."
    )
    yield items(flips) if flips else text("No compared pair changes its order under any lens.")
    head = ("equal", "arm", "n", c.key, "rank", "registered rank", "note")
    yield table(merge(head, rows, {c.key: "#.6g"}), name="lenses", filter=True)


def config_block(c: Loaded) -> Model:
    """Configuration of every arm: values of the first, and what differs from it."""
    arms = list(c.arms.values())
    first = arms[0].trials[0].values
    diffs = []
    for arm in arms:
        values = arm.trials[0].values
        names = [n for n in dict.fromkeys([*first, *values]) if first.get(n) != values.get(n)]
        diffs.append({n: values.get(n, "") for n in names if _tells(n)})
    known = {n: v for n, v in first.items() if _tells(n)}
    return {"type": "config", "arms": [f"{a.label} {a.title}".strip() for a in arms], "base": known, "diffs": diffs}


def _tells(name: str) -> bool:
    """Whether a symbol can tell arms apart: no seed, no decoration."""
    return name != plan.SEED and kconf.decides(name)


# Curves


def curves(arms: Sequence[Arm], keys: Sequence[str]) -> Model | None:
    """Median and range over the seeds of done trials, for each arm and metric."""
    most = max(20, min(POINTS, BUDGET // max(1, len(arms) * len(keys))))
    made = []
    for arm in arms:
        rows = [t.columns for t in arm.trials if t.is_done]
        series = {k: s for k in keys if (s := band(rows, k, most if k == keys[0] else min(most, POINTS // 2)))}
        if series:
            made.append({"name": line(f"{arm.label} {arm.title}"), "series": series})
    return curve_block(made, keys)


# A trial


def trial_model(c: Loaded, t: Trial, base: Mapping[str, str], points: int = POINTS) -> Model:
    """What trials/<id>.html shows."""
    rows = t.columns
    values_of = {n: y for n in rows.spans if len(y := t.curve(n)[1])}
    names = dict.fromkeys([c.key, *FIRST, *values_of])
    drawn = [n for n in names if len(values_of.get(n, ())) > 1][: 6 + points // 50]
    series = {n: band([rows], n, points) for n in drawn}
    last = {n: y[-1].item() for n, y in values_of.items()}
    values = [(n, v, unit(n)) for n, v in sorted(last.items())]
    attempts = [_attempt(t, a) for a in t.dir.attempts()]
    wrong = page.reason(c, t) if t.value(c.key, c.mode) is None else ""
    return {
        "title": t.id,
        "up": "../report.html",
        "banners": page.banners(c, []),
        "lead": f"{c.what}: {shown(t.value(c.key, c.mode), '#.6g')}",
        "facts": [
            f"State: {t.state}" + (f", {line(wrong)}" if wrong else ""),
            f"Arm: {line(t.record['step'] or 'base')} {line(str(t.record['title']))}, seed {t.seed}",
            f"Campaign: {c.name}; hash {t.record['hash'][:12]}; folder {t.place}",
        ],
        "sections": [
            section("Curves", curve_block([{"name": t.id, "series": series}], drawn) or text("No rows.")),
            *([section("Telemetry", *found)] if (found := [*telemetry(t, points)]) else []),
            section("Configuration", _own_config(t, base)),
            section("Contracts", _own_contracts(t)),
            section("Built model", *_built(t)),
            section("Attempts", table(merge(("attempt", "end", "step", "message", "started"), attempts), wrap=True)),
            section(
                "Last values", table(merge(("metric", "value", "unit"), values[:150], {"value": ".6g"}), filter=True)
            ),
            section("Log", {"type": "code", "text": log_tail(t) or "None."}),
        ],
    }


def telemetry(t: Trial, points: int) -> Iterable[Model]:
    """Readings of its devices in the newest attempt, a line broken where samples are missing, and what those of all
    attempts say; nothing without."""
    made = []
    for i, spans in enumerate(gpu.newest(t).values()):
        series = {}
        for name in READINGS:
            found = [s for s in spans if s.reading.get(name) is not None]
            values = [s.reading[name] for s in found]
            drawn = gpu.line(found, thin(values, values, points // 2))
            if drawn:
                ys = [six(r[name]) if r else None for _, r in drawn]
                series[name] = {"n": 1, "x": {"s": [six(at) for at, _ in drawn]}, "y": ys}
        made.append({"name": f"device {i}", "series": series})
    names = [n for n in READINGS if any(n in arm["series"] for arm in made)]
    if names:
        axes = {"s": "seconds since the first sample"}
        yield {"type": "curves", "arms": made, "metrics": names, "units": READINGS, "axes": axes}
        yield items(text.strip() for text in gpu.text(gpu.remarks(t, gpu.recorded(t), full=True)).splitlines())


def _own_config(t: Trial, base: Mapping[str, str]) -> Model:
    values = {n: v for n, v in t.values.items() if n.partition("_")[0] not in kconf.DECORATION}
    diff = {n: values.get(n, "") for n in dict.fromkeys([*base, *values]) if base.get(n) != values.get(n)}
    diff = {n: v for n, v in diff.items() if n.partition("_")[0] not in kconf.DECORATION}
    known = {n: v for n, v in base.items() if n.partition("_")[0] not in kconf.DECORATION}
    return {"type": "config", "arms": ["base", t.id], "base": known, "diffs": [{}, diff]}


def _own_contracts(t: Trial) -> Model:
    rows = [
        (m["name"], "kept" if m["ok"] else "BROKEN", brief(m["expected"]), brief(m["measured"])) for m in contracts(t)
    ]
    return table(merge(("contract", "", "expected", "measured"), rows), wrap=True) if rows else text("None recorded.")


def _built(t: Trial) -> Iterable[Model]:
    built = t.built
    totals = [(k, brief(v)) for k, v in built.items() if k not in ("schema", "attempt", "modules")]
    if not totals:
        yield text("Nothing was built.")
        return
    yield table(merge(("what", "value"), totals), wrap=True)
    modules = [
        (m["path"], m["class"], " ".join(f"{n} {'x'.join(map(str, s['shape']))}" for n, s in m["tensors"].items()))
        for m in built.get("modules", [])
    ]
    yield table(merge(("module", "class", "tensors"), modules[:200]), name="modules", filter=True)


def _attempt(t: Trial, a: rundir.AttemptDir) -> tuple[Any, ...]:
    try:
        end, own = a.read("exit") or {}, a.read("manifest")
    except rundir.RunError as error:
        return (a.number, "damaged", None, line(str(error).replace(f"{t.dir.campaign.path}/", "")), None)
    ran = own or (t.manifest if a.number == t.attempt else {})
    state = ": ".join(p for p in (end.get("state"), end.get("class")) if p) or "no exit.json"
    return (a.number, state, end.get("step"), line(end.get("message", "")), ran.get("created"))


def log_tail(t: Trial) -> str:
    """The end of the newest log, without what drives a terminal and without folders of this machine."""
    path = t.dir.attempt(t.attempt).log if t.attempt else None
    if path is None or not path.exists():
        return ""
    with rundir.plain(path) as file:
        file.seek(max(0, path.stat().st_size - LOG_BYTES))
        found = file.read().decode(errors="replace").splitlines()[-LOG_LINES:]
    clean = "\n".join("".join(ch if ch.isprintable() or ch == "\t" else "?" for ch in each) for each in found)
    for folder, name in ((t.dir.campaign.path, t.dir.campaign.name), (kconf.ROOT, ".")):
        clean = clean.replace(str(folder), name)
    return clean


def last_line(t: Trial) -> str:
    """The last line of its log that says anything."""
    return next((text for text in reversed(log_tail(t).splitlines()) if text.strip()), "")
