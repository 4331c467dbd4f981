# SPDX-License-Identifier: MIT
"""report.md of a campaign with its tables and figures, and the short table for the terminal."""

import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean, stdev
from typing import Any

from ablab import metrics, plan, rundir
from ablab.report import plots, stats
from ablab.report.load import Arm, Loaded, Trial
from ablab.report.stats import Verdict
from ablab.report.table import Cell, Table, escape, line, merge

BANNER = "NOT CERTIFIED: no certificate holds for this campaign, so its numbers support no published claim"
SPREAD = {"mean": "#.5g", "sd": "#.2g", "min": "#.5g", "max": "#.5g"}
COST: dict[str, tuple[str, Callable[[Mapping[str, Any]], float]]] = {
    "parameters": (",.0f", lambda s: s["model"]["params"]),
    "tokens": (",.0f", lambda s: s["used"]["tokens"]),
    "training s": (",.1f", lambda s: s["used"]["train_s"]),
    "tokens/s": (",.0f", lambda s: s["perf"]["tok_per_s"]),
    "peak GiB": (".2f", lambda s: s["perf"]["peak_mem_bytes"] / 2**30),
}
ACCURACY: dict[str, tuple[str, Callable[[Mapping[str, Any]], float | None]]] = {
    "test %": (".2f", lambda s: s["final"].get("test_accuracy")),
    "test % at the best": (".2f", lambda s: s["best"].get("test_accuracy", {}).get("value")),
}
"""Of the last weights, and of those with the highest validation accuracy; shown where there is one."""


def build(c: Loaded, verdicts: Sequence[Verdict], figures: Sequence[str]) -> None:
    """Write report.md, table.csv and base.config."""
    folder = c.dir.report
    rundir.write_bytes(folder / "table.csv", trial_table(c).csv().encode())
    rundir.write_bytes(folder / "base.config", c.content["base"]["config"].encode())
    rundir.write_bytes(folder / "report.md", markdown(c, verdicts, figures).encode())


def banners(c: Loaded, placebo: Sequence[tuple[str, bool]]) -> list[str]:
    """What stands on top of every page."""
    return [BANNER] * (c.certified is None) + [f"PLACEBO VERDICT: {text}" for text, is_bad in placebo if is_bad]


# What is known


def judge(c: Loaded) -> list[Verdict]:
    """Verdicts of all registered contrasts and of each other step against its parent, in study order."""
    return stats.judge([_contrast(c, *pair) for pair in c.pairs()], _rule(c))


def placebos(c: Loaded) -> list[Verdict]:
    """Verdicts of the A/A arms against the baseline, each a family of its own.  Their seeds are disjoint, so the test
    is the unpaired one; a difference found here is a false one."""
    rule = replace(_rule(c), is_paired=False, looks=())
    return [stats.judge([_contrast(c, copy, base, True)], rule)[0] for copy, base in c.placebos()]


def _rule(c: Loaded) -> stats.Rule:
    r = c.registered
    known = {n: r[n] for n in ("alpha", "sides", "margin", "failures")}
    return stats.Rule(
        better=c.metric.better, is_paired=r["paired"], looks=tuple(r["looks"]), fixed=c.key in metrics.FIXED, **known
    )


def _contrast(c: Loaded, left: Arm, right: Arm, registered: bool) -> stats.Contrast:
    shared = {k: v for k, v in left.axes.items() if right.axes.get(k) == v}
    own = [{k: v for k, v in arm.axes.items() if k not in shared} for arm in (left, right)]
    values = [arm.by_seed(c.key, c.mode) for arm in (left, right)]
    trials = [(s, t, v) for s, arm, v in zip("ab", (left, right), values, strict=True) for t in arm.trials]
    hours = [_mean(arm, lambda s: s["used"]["total_s"] / 3600) for arm in (left, right)]
    return stats.Contrast(
        left=plan.arm_text(left.step, own[0]) or "base",
        right=plan.arm_text(right.step, own[1]) or "base",
        title=left.title,
        where=plan.arm_text(None, shared),
        a=values[0],
        b=values[1],
        failed=tuple((side, t.seed, _fate(t)) for side, t, got in trials if not t.is_open and t.seed not in got),
        waiting=sum(t.is_open for _, t, _ in trials),
        hours=None if None in hours else sum(h or 0 for h in hours),
        registered=registered,
    )


def _fate(t: Trial) -> str:
    return f"{t.id} ({'no value' if t.is_done else t.state})"


def _mean(arm: Arm, of: Callable[[Mapping[str, Any]], float | None]) -> float | None:
    values = [x for t in arm.trials if t.summary is not None and (x := of(t.summary)) is not None]
    return fmean(values) if values else None


def _spread(values: Sequence[float]) -> tuple[float | None, ...]:
    """mean, sd, min, max; no spread of a single seed."""
    if len(values) < 2:
        return (*values, *[None] * (4 - len(values)))
    return fmean(values), stdev(values), min(values), max(values)


# Tables


def arm_table(c: Loaded) -> Table:
    """Mean and spread over seeds of every arm, what it costs, and the trials that this rests on."""
    rows: list[tuple[Cell, ...]] = []
    shown = {k: v for k, v in ACCURACY.items() if any(_mean(arm, v[1]) is not None for arm in c.arms.values())} | COST
    for arm in c.arms.values():
        values = arm.by_seed(c.key, c.mode)
        ids = " ".join(t.id for t in arm.trials if t.seed in values)
        head = (arm.label, arm.title, f"{len(values)} of {len(arm.trials)}")
        rows.append((*head, *_spread([*values.values()]), *(_mean(arm, of) for _, of in shown.values()), ids))
    return merge(
        ("arm", "title", "n", *SPREAD, *shown, "trials"),
        rows,
        {**SPREAD, **{k: f for k, (f, _) in shown.items()}},
    )


def verdict_table(c: Loaded, verdicts: Sequence[Verdict]) -> Table:
    """Effect first: difference, interval, n, then p, then the word."""
    formats = {f"difference ({c.metric.unit})": "+#.4g", "%": "+.2f"}
    columns = ("contrast", *formats, "interval", "n", "p", "p family", "corr", "verdict", "note")
    rows = [
        (v.contrast.label, v.effect, v.percent, span(v), v.n, v.p, v.p_family, v.correlation, v.word, v.note)
        for v in verdicts
    ]
    return merge(columns, rows, formats | {"p": ".4g", "p family": ".4g", "corr": ".2f"})


def span(v: Verdict) -> str:
    """The interval with the level that n allows."""
    return "-" if v.interval is None else "{:+#.4g} .. {:+#.4g} ({:.1%})".format(*v.interval)


def trial_table(c: Loaded) -> Table:
    """One row for each trial of the plan, with everything that its summary holds."""
    parts = ("final", "used", "perf", "model")
    facts = [{f"{p}.{k}": v for p in parts for k, v in t.summary[p].items()} if t.summary else {} for t in c.trials]
    for t, f in zip(c.trials, facts, strict=True):
        f |= {f"best.{k}": b["value"] for k, b in t.summary["best"].items()} if t.summary else {}
    axes = list(dict.fromkeys(k for arm in c.arms.values() for k in arm.axes))
    names = list(dict.fromkeys(k for f in facts for k in f))
    head = ("trial", "hash", "step", "title", *axes, "seed", "state", "attempt", f"{c.key} {c.mode}")
    rows: list[list[Cell]] = []
    for t, f in zip(c.trials, facts, strict=True):
        r = t.record
        rows.append([t.id, r["hash"], r["step"], r["title"], *(r["axes"].get(k) for k in axes)])
        rows[-1] += [t.seed, t.state, t.attempt, t.value(c.key, c.mode), *(f.get(n) for n in names)]
    return merge((*head, *names), rows)


def summary_table(c: Loaded) -> str:
    """Arms with mean, spread, n, the difference to what each is compared with, and what has no result."""
    against: dict[str, list[Verdict]] = {}
    for (left, _, _), v in zip(c.pairs(), judge(c), strict=True):
        against.setdefault(left.text, []).append(v)
    rows: list[tuple[Cell, ...]] = []
    for arm in c.arms.values():
        values = [*arm.by_seed(c.key, c.mode).values()]
        head: tuple[Cell, ...] = (
            arm.label,
            arm.title[:36],
            f"{len(values)}/{len(arm.trials)}",
            *_spread(values)[:2],
        )
        for v in against.get(arm.text, []):
            note = f": {v.note}" if v.note else ""
            rows.append((*head, v.effect, v.percent, f"to {v.contrast.right}", v.word + note))
            head = ("", "", "", None, None)
        rows += [] if arm.text in against else [(*head, None, None, "", "")]
    columns = ("arm", "title", "n", "mean", "sd", "difference", "%", "", "verdict")
    table = merge(columns, rows, SPREAD | {"difference": "+#.4g", "%": "+.2f"})
    lost = [line(f"no result: {_fate(t)} {reason(c, t)}") for t in c.trials if t.is_lost]
    return "\n".join([f"{c.name}: {c.what}", table.text(), *lost, *banners(c, [])])


def reason(c: Loaded, t: Trial) -> str:
    return f"has no finite {c.key}" if t.is_done else t.reason.replace(f"{c.dir.path}/", "")


# The page


def markdown(c: Loaded, verdicts: Sequence[Verdict], figures: Sequence[str]) -> str:
    """The whole page."""
    question, placebo = c.registered["question"], placebo_tests(c)
    parts = [
        f"# {escape(c.name)}",
        *(f"> **{escape(text)}**." for text in banners(c, placebo)),
        f"**Question.** {escape(question)}" if question else "No question was registered.",
        _bullets(facts(c)),
        "## Verdicts",
        verdict_table(c, verdicts).markdown() if verdicts else "No contrast: nothing is compared here.",
        "## Arms",
        f"{escape(c.what)}. Only done trials count; sd, min, max: over seeds; cost: mean of a trial.",
        arm_table(c).markdown(),
        "## Trials without a result",
        _without(c),
        "## Figures",
        "\n\n".join(map(_figure, figures)) or "None: no trial is done.",
        "## Not tested",
        _bullets(untested(c, verdicts, placebo)),
        "## Methods",
        _bullets(methods(c)),
        "## Reproduction",
        "\n".join(f"    {text}" for text in commands(c)),
        f"Inputs `{c.inputs()}`. All trials with all their numbers: [table.csv](table.csv).",
    ]
    return "\n\n".join(parts) + "\n"


def _bullets(items: Iterable[str]) -> str:
    return "\n".join(f"- {escape(item)}" for item in items)


def _figure(name: str) -> str:
    files = ", ".join(f"[{suffix}]({name}.{suffix})" for suffix in plots.SUFFIXES)
    return f"![{name}]({name}.png)\n\n{plots.figure(name).CAPTION} {files}"


def facts(c: Loaded) -> Iterable[str]:
    r, code, study, data = c.registered, c.content["code"], c.content["study"], c.content["data"]
    states = Counter(t.state for t in c.trials)
    count = ", ".join(f"{n} {state}" for state, n in states.items())
    yield f"Trials: {states['done']} of {len(c.trials)} done; {count}"
    pairing = ", paired" if r["paired"] else ""
    yield f"Metric: {c.what}; budget: {r['budget']}; seeds: {r['seeds']}{pairing}"
    if study:
        yield f"Study: {study['name']} ({study['sha256'][:12]}), {c.content['kind']}"
    if not r["as_written"]:
        yield "Not as written: steps, axes or seeds come from the make line"
    yield f"Data: {data['name']} ({data['sha256'][:12]})"
    manifests = [m for t in c.trials if t.is_done and (m := t.manifest)]
    devices = Counter(" + ".join(d["name"] for d in m["devices"]) or m["cpu"]["model"] for m in manifests)
    yield from (f"Hardware: {name}, {n} trials" for name, n in sorted(devices.items()))
    dirty = ", with changes that are not committed" if code["dirty"] else ""
    yield f"Code: {code['commit'] or 'no commit'}{dirty} (tree {code['tree'][:12]})"
    if c.certified:
        yield f"Certificate: {c.certified}"
    yield f"Started: {c.content['created']}"
    if added := len(c.trials) - len(c.content["trials"]):
        why = ", ".join(n["reason"] for n in c.replay.notes if n["kind"] == "amend")
        yield f"Amended after the start: {added} trials added ({why})"
    yield from (f"Damage: {text.replace(f'{c.dir.path}/', '')}" for text in c.replay.problems)


def _without(c: Loaded) -> str:
    trials = [t for t in c.trials if t.value(c.key, c.mode) is None]
    rows = [(t.id, "no value" if t.is_done else t.state, t.attempt, reason(c, t), t.place) for t in trials]
    table = merge(("trial", "state", "attempts", "reason", "path"), rows)
    return table.markdown() if rows else "None: every trial of the plan is done."


def placebo_tests(c: Loaded) -> list[tuple[str, bool]]:
    """A line for each A/A arm, and whether the test sees a difference that cannot be there."""
    found = [v for v in placebos(c) if v.effect is not None]
    text = "{} against {}: {:+.4g}, unpaired p {:.3g}, {}"
    return [(text.format(v.contrast.left, v.contrast.right, v.effect, v.p, v.word), v.is_different) for v in found]


def untested(c: Loaded, verdicts: Sequence[Verdict], placebo: Sequence[tuple[str, bool]]) -> Iterable[str]:
    """What a reader might take as shown and is not."""
    seeds, data, check = [t.seed for t in c.trials], c.content["data"]["name"], c.content["check"]["verdict"]
    yield f"data other than {data}, other budgets, seeds outside {min(seeds)} to {max(seeds)}"
    yield "equal time, FLOPs or memory: the registered budget alone decides here"
    yield from (f"{v.contrast.label}: {v.word}" + (f", {v.note}" if v.note else "") for v in verdicts if v.is_open)
    yield from (f"{plan.arm_text(None, s['axes'])}: skipped, {s['reason']}" for s in c.content["skipped"])
    if single := [a.label for a in c.arms.values() if len(a.trials) == 1]:
        yield f"spread over seeds: n=1 in {', '.join(single)}"
    yield from (f"placebo {text}" for text, _ in placebo)
    if not placebo:
        yield "false verdicts of this setup: no placebo arm has a result"
    if check != "passed":
        yield f"the dry run: its verdict is {check!r}"


def methods(c: Loaded) -> Iterable[str]:
    r, sides = c.registered, {1: "one", 2: "two"}[c.registered["sides"]]
    paired = "all 2^n sign flips of the mean paired difference (10^6 drawn ones above n = 20)"
    unpaired = "all permutations of the two arms (10^6 drawn ones above 11 trials an arm)"
    yield f"Test: {sides}-sided, exact, {paired if r['paired'] else unpaired}"
    yield "Interval: the effects that this test does not reject, at the level that n allows"
    yield f"p family: Holm over all registered contrasts, to be held against alpha {r['alpha']:g}"
    if r["margin"]:
        yield f"Margin: {r['margin']:g}, two one-sided exact tests, Holm over the same contrasts"
    if r["looks"]:
        yield f"Looks: at n = {', '.join(map(str, r['looks']))}, alpha split evenly"
    block, worst = "leaves its contrasts undecided, p = 1", "loses its pair in a sign test"
    yield f"Failures: {r['failures']}, a failed trial {block if r['failures'] == 'block' else worst}"
    yield "Words: fragile, without one of the seeds the verdict is gone; exploratory, not registered, no verdict"
    yield "Seeds still needed: normal approximation, 80 % power at the effect seen"


def commands(c: Loaded) -> Iterable[str]:
    """From a checkout to a campaign of the same plan; base.config holds the rest of the make line."""
    given = {k: line(v).replace("$", "$$") for k, v in c.content["make_vars"].items() if k in ("SEEDS", "SWEEP")}
    code = c.content["code"]
    yield (f"git checkout {code['commit']}" if code["commit"] else f"# no commit; sources are tree {code['tree']}")
    if code["patch"]:
        patch = c.trials[0].dir.attempt(1).patch.relative_to(c.dir.path)
        yield f"git apply results/{c.name}/{patch}"
    yield f"cp results/{c.name}/report/base.config .config"
    yield " ".join(["make NEW=1", *(f"{k}={shlex.quote(v)}" for k, v in given.items())])
