# SPDX-License-Identifier: MIT
"""Holds the trials of each claimed contrast against the rules: entries of the certificate, and findings."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

from ablab import kconf, plan
from ablab.plan import smallest_p
from ablab.report import gpu, page, stats
from ablab.report.lens import lenses
from ablab.report.load import Arm, Loaded, Trial
from ablab.report.stats import Verdict
from ablab.verify import _records, _trackers
from ablab.verify._fields import EFFECTS, EQUAL_BUDGET, FIELDS, GROUPS, READERS, AbsentError, Facts, Field, short

LEAST_SEEDS = 3
HOT = 5.0  # percent of the samples in which a device was throttled; above it no speed is claimed
SAMPLED = 0.9  # share of the time; below it a throttled or shared device may have been missed
SPEED = ("train/tok_per_sec", "train/samples_per_sec", "train/step_s", "train/mfu", "total_training_time")
Values = dict[str, Any]
ABSENT = "absent"
MIRROR = ("project", "runs")
WEIGHTS = READERS["weights"]


class Judge:
    """One pass over the claims of a campaign."""

    def __init__(self, c: Loaded, claims: Sequence[tuple[Arm, Arm, Verdict]], kind: str, weights: bool = True) -> None:
        self.c, self.claims, self.kind, self.weights = c, claims, kind, weights
        self.groups: dict[str, list[dict[str, Any]]] = {name: [] for name in GROUPS}
        self.findings: list[dict[str, Any]] = []
        arms = {arm.text: arm for left, right, _ in claims for arm in (left, right)}
        self.arms = {arm.label: [t for t in arm.trials if t.is_done] for arm in arms.values()}
        self.trials = [t for trials in self.arms.values() for t in trials]
        self.facts = {t.id: Facts(t, c.key, c.mode, c.content["auto"]) for t in self.trials}
        self.differs: dict[tuple[str, str], set[str]] = {(a.label, b.label): set() for a, b, _ in claims}
        """Contrast -> fields that differ in it."""
        self.budget = EQUAL_BUDGET[c.registered["budget"]]

    def judge(self) -> None:
        """Fill `groups` and `findings`."""
        self.declared = {(a.label, b.label): self._declared(a, b) for a, b, _ in self.claims}
        for field in FIELDS:
            self._field(field)
        for check in (
            self._budget,
            self._batch,
            self._pruning,
            self._hardware,
            self._code,
            self._effects,
            self._statistics,
            self._integrity,
            self._mirror,
            self._treatment,
        ):
            check()

    # entries

    def entry(self, group: str, name: str, rule: str, values: Values, why: str = "", fix: str = "") -> None:
        """A line of the certificate; with `why` a refusal."""
        good = {"E": "equal", "T": "equal", "R": "recorded", "C": "passed"}[rule]
        self._line(group, name, rule, values, "refused" if why else good)
        if why:
            self.refuse(f"{group}.{name}", rule, values, why, fix)

    def _line(self, group: str, name: str, rule: str, values: Values, status: str) -> None:
        shown = {arm: _compact(v) for arm, v in values.items()}
        self.groups[group].append({"name": name, "rule": rule, "values": shown, "status": status})

    def refuse(self, field: str, rule: str, values: Values, why: str, fix: str) -> None:
        shown = {arm: _compact(v) for arm, v in values.items()}
        self.findings.append({"field": field, "rule": rule, "values": shown, "why": why, "fix": fix})

    def each(self, read: Callable[[Facts], Any]) -> dict[str, dict[str, Any]]:
        """Arm -> trial -> value; `absent` where there is no record."""

        def safe(t: Trial) -> Any:
            try:
                return read(self.facts[t.id])
            except (AbsentError, KeyError, TypeError, IndexError):
                return ABSENT

        return {arm: {t.id: safe(t) for t in trials} for arm, trials in self.arms.items()}

    def lacks(self, t: Trial, record: str) -> None:
        """Refuse all fields that are read from a record which a trial lacks: being damaged, it met no rule."""
        for f in FIELDS:
            for facts in list(self.facts.values())[:1]:
                facts.touched.clear()
                with suppress(AbsentError):
                    facts.read(f)
                if any(record.startswith(name) or name.startswith(record) for name in facts.touched):
                    self.refuse(f.full, f.rule, {t.id: ABSENT}, f"{t.id}: no record of {record}", "make rerun")

    # rules E, T and R

    def _field(self, f: Field) -> None:
        by_trial = self.each(lambda facts: facts.read(f))
        lacking = [i for trials in by_trial.values() for i, v in trials.items() if v == ABSENT]
        if lacking:
            why = f"{', '.join(lacking)}: no record of {f.where.removeprefix('?')}"
            self.entry(f.group, f.name, f.rule, by_trial, why, "run these trials again with this ablab")
            return
        rule = self._rule(f)
        seeds = {t.id: t.seed for t in self.trials}
        values = {arm: {seeds[i]: v for i, v in trials.items()} for arm, trials in by_trial.items()}
        if f.full == "code.modules":  # arms load different members; what both load must be the same
            shared = set.intersection(*(set(v) for by_seed in values.values() for v in by_seed.values()))
            values = {a: {s: {m: v[m] for m in shared} for s, v in by.items()} for a, by in values.items()}
        same = lambda a, b: _equal(a, b, f)
        if rule != "R" and not f.per_seed:
            for arm, by_seed in values.items():
                if not all(same(a, b) for a, b in pairwise(by_seed.values())):
                    fix = "run the trials of an arm alike, in one campaign on one machine"
                    self.entry(f.group, f.name, rule, *_told(values, f"differs between the seeds of {arm}"), fix)
                    return
        status, why = {"E": "equal", "T": "equal", "R": "recorded"}[rule], ""
        for pair in self.differs:
            left, right = (values[arm] for arm in pair)
            if not self._sides_differ(f, left, right, same):
                continue
            self.differs[pair].add(f.full)
            if rule == "R":
                continue
            if rule == "T" and any(s.startswith(f.by) for s in self.declared[pair]):
                status = "treatment"
            else:
                may = f", which only {' '.join(f.by)} may change" if rule == "T" else ""
                why = why or f"differs between {pair[0]} and {pair[1]}{may}"
        fix = (
            "declare it as the treatment in the study, or make it equal"
            if rule == "T"
            else "make it equal and run again"
        )
        if why:
            self.entry(f.group, f.name, rule, *_told(values, why), fix)
        else:
            self._line(f.group, f.name, rule, values, status)

    def _rule(self, f: Field) -> str:
        timed = self.c.registered["budget"] == "time"
        if f.group == "budget" and f.name == self.budget:
            return "E"
        return "R" if f.steps and timed else f.rule

    def _sides_differ(self, f: Field, left: Values, right: Values, same: Callable[[Any, Any], bool]) -> bool:
        seeds = left.keys() & right.keys()
        if f.full == "model.init":  # where shapes agree
            return any(left[s][k] != right[s][k] for s in seeds for k in left[s].keys() & right[s].keys())
        if f.per_seed or f.full == "model.weights":
            return any(not same(left[s], right[s]) for s in seeds)
        return not all(same(a, b) for a in left.values() for b in right.values())

    # treatment

    def _declared(self, left: Arm, right: Arm) -> frozenset[str]:
        """Symbols that the frozen plan sets differently in the two arms."""
        one, two = ({o.removeprefix("CONFIG_") for o in a.trials[0].record["overrides"]} for a in (left, right))
        return frozenset(o.partition("=")[0] for o in one ^ two) - {plan.SEED}

    def _treatment(self) -> None:
        def as_planned(f: Facts) -> str:
            odd = sorted(n for n in {*f.t.values, *f.config} if f.t.values.get(n) != f.config.get(n))
            return f"{' '.join(odd[:8])} ran with another value than planned" if odd else "ok"

        self.passes("treatment", "config", as_planned, "run the trial again: make rerun")
        tree, configs = kconf.load(), self.each(lambda f: f.config)
        for left, right, _ in self.claims:
            pair = left.label, right.label
            declared = self.declared[pair]
            one, two = (next((c for c in configs[label].values() if c != ABSENT), {}) for label in pair)
            differing = {n for n in one.keys() & two.keys() if one[n] != two[n]} - {plan.SEED}
            # what follows from a declared symbol: the rest of its choice, and symbols that nobody can set
            implied = {s for n in declared if n in tree.symbols for s in tree.siblings(n)}
            implied |= {n for n in differing if n in tree.symbols and not tree.symbols[n].prompt}
            extra = sorted(n for n in differing - declared - implied if kconf.decides(n))
            still = sorted(declared & one.keys() & two.keys() - differing)
            idle = {n: f for n in sorted(declared) for p, f in EFFECTS.items() if n.startswith(p)}
            idle = {n: f for n, f in idle.items() if f not in self.differs[pair]}
            shown = {
                label: {n: c.get(n, "-") for n in sorted({*declared, *extra})}
                for label, c in zip(pair, (one, two), strict=True)
            }
            why = ""
            if not declared:
                why, fix = (
                    "no-op: the arms do not differ, and an A/A comparison makes no claim",
                    "claim another contrast",
                )
            if still:
                why, fix = f"no-op: {' '.join(still)} is the same in both", "run the trials again"
            if idle:
                why = "no-op: " + ", ".join(f"{n} left {field} as it was" for n, field in idle.items())
                fix = "find why it has no effect"
            if extra:
                why, fix = (
                    f"confounder: {' '.join(extra)}",
                    "declare it as the treatment in the study, or make it equal",
                )
            name = f"{left.label} - {right.label}"
            self._line("treatment", name, "T", shown, "refused" if why else "treatment")
            if why:
                self.refuse(f"treatment.{name}", "T", shown, why, fix)

    # checks

    def passes(self, group: str, name: str, read: Callable[[Facts], str], fix: str, good: str = "ok") -> None:
        """A check C of each trial: `read` says what is wrong, or `good`."""
        values = self.each(read)
        bad = {i: v for by in values.values() for i, v in by.items() if v != good}
        why = "; ".join(f"{i}: {v}" for i, v in bad.items())
        self.entry(group, name, "C", values, why, fix)

    def _budget(self) -> None:
        """Under another budget than time, what equal time would show stands beside it."""
        if self.budget == "train_s":
            return
        time = next((found for found in lenses(self.c) if found.name == "train_s"), None)
        why = "" if time else "no lens of equal time can be made of the rows"
        values: Values = {"at_s": time.at, "flips": [" - ".join(pair) for pair in time.flips]} if time else {}
        for arm in self.c.arms.values() if time else ():
            if arm.label in self.arms and (p := time.arms.get(arm.text)):
                values[arm.label] = {"value": p.value, "rank": p.rank, "mid_schedule": p.mid_schedule}
        self.entry("budget", "time_lens", "R", values, why, "run the trials again, to the end")

    def _batch(self) -> None:
        def product(f: Facts) -> str:
            b = f.get("manifest.batch")
            parts = b["micro"] * b["accum"] * b["world"], b["effective"] * b["seq_len"]
            fits = parts == (b["effective"], b["tokens_per_step"])
            return _records.contract(f, "batch/product") if fits else f"{parts[0]} sequences, {parts[1]} tokens: {b}"

        self.passes("batch", "product", product, "micro x accumulation x world must be the effective batch")

    def _pruning(self) -> None:
        def contract(f: Facts) -> str:
            names = [x["name"] for x in f.get("summary.contracts") if x["name"].startswith("prune/")]
            found = [said for n in names if (said := _records.contract(f, n)) != "ok"]
            return "; ".join(found) or ("ok" if names else "no contract of a pruner")

        self.passes("pruning", "contract", contract, "see contracts.jsonl of the trial")

    def _hardware(self) -> None:
        left = {t.id: gpu.recorded(t) for t in self.trials if self.facts[t.id].gpu}
        m = {i: [row["m"] for row in gpu.windows(found)] for i, found in left.items()}

        def measured(found: Callable[[str], float | None]) -> Values:
            values = self.each(lambda f: found(f.t.id) if f.gpu else "no GPU")
            return {a: {i: ABSENT if v is None else v for i, v in by.items()} for a, by in values.items()}

        def hottest(i: str) -> float | None:
            found = [row["gpu/throttle_pct"] for row in m[i] if "gpu/throttle_pct" in row]
            return round(max(found), 3) if found else None

        def refusals(values: Values, bad: Callable[[float], bool]) -> str:
            numbers = {i: v for by in values.values() for i, v in by.items() if v != "no GPU"}
            return "; ".join(f"{i}: {v}" for i, v in numbers.items() if v == ABSENT or bad(v))

        values = measured(hottest)
        why = refusals(values, lambda v: v >= HOT) if self.kind == "speed" else ""
        why += f": a speed is claimed below {HOT:g} % only" if why else ""
        self.entry("hardware", "throttling", "R", values, why, "measure on a cool device, with telemetry on")
        values = measured(lambda i: round(gpu.sampled(self.facts[i].t, left[i]), 3))
        why = "" if self.kind == "quality" else refusals(values, lambda v: v < SAMPLED)
        why += f": {self.kind} is claimed where {SAMPLED:g} of the time or more was sampled" if why else ""
        self.entry(
            "hardware", "coverage", "C", values, why, "run again with telemetry on, TELEM_PERIOD_MS below a row's"
        )

        def shared(f: Facts) -> str:
            beside = f.get("manifest.neighbours")
            foreign = f.gpu and any(row.get("gpu/shared") for row in m[f.t.id])
            if self.kind == "quality" or not (beside or foreign):
                return "ok"
            return "another process used the device" if foreign else f"beside {' '.join(beside)}"

        self.passes("hardware", "shared", shared, "run one trial at a time (JOBS=1) on a device of its own")

    def _code(self) -> None:
        def clean(f: Facts) -> str:
            code = f.get("manifest.code")
            if not code["commit"]:
                return "of no commit"
            return f"uncommitted changes, patch {str(code['patch'])[:12]}" if code["dirty"] or code["patch"] else "ok"

        self.passes("code", "clean", clean, "commit, then run the trials again: NEW=1")

    def _effects(self) -> None:
        def contracts(f: Facts) -> str:
            found = f.get("summary.contracts")
            broken = [said for x in found if (said := _records.contract(f, x["name"])) != "ok"]
            return "; ".join(broken) or ("ok" if found else "no contract was judged")

        self.passes("effects", "contracts", contracts, "a breached contract has no result to publish")
        self.entry("effects", "declared", "R", self.each(lambda f: [x["name"] for x in f.get("summary.contracts")]))

    def _statistics(self) -> None:
        c, r = self.c, self.c.registered
        family = [f"{a.label} - {b.label}" for a, b, registered in c.pairs() if registered]
        say = lambda name, rule, value, why="", fix="": self.entry("statistics", name, rule, {c.name: value}, why, fix)
        measured = "speed" if c.key in SPEED or c.key.startswith("time/") else "quality"
        measured = "memory" if c.key.startswith("memory/") else measured
        why = f"{c.key} is a metric of {measured}, not of {self.kind}" if measured != self.kind else ""
        say("metric", "C", f"{c.key} {c.mode}, {c.metric.unit}", why, f"KIND={measured}, or register another metric")
        study = c.content["study"]
        why = _records.registered(study, r) if study and family else "no contrast was registered before the first trial"
        say(
            "registration", "C", study and study["sha256"], why, "compare in a study; make plan shows what it registers"
        )
        say("pairing", "R", "paired by seed" if r["paired"] else "unpaired")
        rule = f"exact, {r['sides']}-sided, alpha {r['alpha']:g}, margin {r['margin']}, failures {r['failures']}"
        say("test", "R", f"{rule}, looks {r['looks']}")
        say("family", "R", family)
        placebos = page.placebos(c)
        told = [f"{v.contrast.label}: {v.word}" for v in placebos] or "none registered"
        why = "equal arms got a verdict" if any(v.is_different for v in placebos) else ""
        say("placebo", "C", told, why, "find what differs between equal arms before anything is claimed")
        found = {v.contrast.label: self._claim(left, right, v, len(family)) for left, right, v in self.claims}
        for field in next(iter(found.values())):
            by = {label: checks[field] for label, checks in found.items()}
            bad = [(f"{label}: {why}", fix) for label, (_, why, fix) in by.items() if why]
            why, fix = "; ".join(w for w, _ in bad), bad[0][1] if bad else ""
            self.entry("statistics", field, "C", {label: value for label, (value, _, _) in by.items()}, why, fix)
        values = {arm: {t.seed: t.value(c.key, c.mode) for t in trials} for arm, trials in self.arms.items()}
        self.entry("statistics", "value", "R", values)

    def _claim(self, left: Arm, right: Arm, v: Verdict, family: int) -> dict[str, tuple[Any, str, str]]:
        """Field -> (value, why it refuses, what to do) of one contrast."""
        r, least = self.c.registered, LEAST_SEEDS
        if v.effect:
            self.differs[left.label, right.label].add("statistics.value")
        alpha = r["alpha"] / max(1, len(r["looks"]))
        sides = [r["sides"]] + ([1] if r["margin"] else [])
        able = v.n > 0 and min(smallest_p(v.n, r["paired"], s) for s in sides) * max(1, family) <= alpha
        need = stats.needed(alpha, max(1, family), r["paired"], r["sides"])
        lost = [what for _, _, what in v.contrast.failed]
        out = f"no result of {', '.join(lost)}" if lost and r["failures"] == "block" else ""
        out = f"{v.contrast.waiting} trials have not ended" if v.contrast.waiting else out
        few = "" if v.n >= least else f"{v.n} seeds, {least} or more are needed"
        late = f"{v.n} seeds, {r['seeds']} were registered: the others came when results were known"
        few = late if v.n > max(r["seeds"], *r["looks"], 0) else few
        listed = v.contrast.registered
        return {
            "claimed": (listed, "" if listed else "not registered, so exploratory", "claim a registered contrast"),
            "n": (v.n, few, "register the seeds, or looks, in a new campaign: NEW=1"),
            "seeds": self._seeds(left, right),
            "decides": (able, "" if able else f"n={v.n} cannot decide", f"register {need} seeds"),
            "verdict": (v.word, "" if v.is_decided else f"{v.word}: {v.note}", "claim what is decided: CLAIM="),
            "left_out": (lost, out, "make continue, or make rerun"),
        }

    def _seeds(self, left: Arm, right: Arm) -> tuple[Any, str, str]:
        sides = [[t.seed for t in arm.trials] for arm in (left, right)]
        ran = {i: seed for by in self.each(lambda f: f.get("manifest.seeds.train")).values() for i, seed in by.items()}
        why = ""
        if odd := [t.id for t in self.trials if ran[t.id] != t.seed]:
            why = f"{', '.join(odd)}: ran with another seed than planned"
        elif any(len(set(s)) < len(s) for s in sides):
            why = "a seed is used twice in one arm"
        elif copies := self._copies(left, right):
            why = f"{' and '.join(copies)} ended with the same weights: one measurement, counted twice"
        elif self.c.registered["paired"] and set(sides[0]) != set(sides[1]):
            why = "paired by seed, but the arms have different seeds"
        return sides, why, "give every trial of an arm a seed of its own, the same ones in both arms"

    def _copies(self, *arms: Arm) -> list[str]:
        """Trials of one arm with equal final weights, whatever seeds they claim."""
        for arm in arms:
            seen: dict[str, str] = {}
            for t in (t for t in arm.trials if t.is_done):
                with suppress(AbsentError, KeyError, TypeError, IndexError):
                    if (other := seen.setdefault(WEIGHTS(self.facts[t.id]), t.id)) != t.id:
                        return [other, t.id]
        return []

    def _integrity(self) -> None:
        def whole(f: Facts) -> str:
            newest = f.t.dir.saved()[:1] if self.weights else []
            flaw = f.t.dir.flaw() or next(filter(None, (p.flaw() for p in newest)), None)
            return flaw.replace(f"{self.c.dir.path}/", "") if flaw else "ok"

        self.passes("integrity", "done", whole, "run the trial again: make rerun")
        lost = {t.id: t.reason.replace(f"{self.c.dir.path}/", "") for t in self.c.trials if t.state == "damaged"}
        why = "; ".join(f"{i}: {text}" for i, text in lost.items())
        self.entry("integrity", "trials", "C", {self.c.name: list(lost)}, why, "restore the files, or make rerun")
        problems = [p.replace(f"{self.c.dir.path}/", "") for p in self.c.replay.problems]
        ended = {t.id: t.entry.state.value for t in self.trials}
        problems += [f"{i} is done, and {state} in the journal" for i, state in ended.items() if state != "done"]
        self.entry(
            "integrity", "journal", "C", {self.c.name: problems}, "; ".join(problems), "restore the journal from a copy"
        )
        self.passes("integrity", "steps", _records.steps, "run the trial again: make rerun")
        self.entry("integrity", "attempts", "R", self.each(lambda f: f.get("summary.attempts")))
        key, mode = self.c.key, self.c.mode
        self.passes("integrity", "value", lambda f: _records.value(f, key, mode), "run the trial again: make rerun")
        fix = "a result is replaced for no trial alone: run the whole plan again, NEW=1"
        self.passes("integrity", "reruns", lambda f: _records.reruns(f, key), fix)
        self.passes("integrity", "drift", _records.drift, "run the trial again from step 0: make rerun")
        added = [n["reason"] for n in self.c.replay.notes if n["kind"] == "amend"]
        self.entry("integrity", "amendments", "R", {self.c.name: added})
        taken = {t.id: t.record["reused"] for t in self.trials if "reused" in t.record}
        self.entry("integrity", "reused", "R", taken or {self.c.name: "none"})

    def _mirror(self) -> None:
        used = _trackers.used(self.c, self.trials)
        for name in used:
            told, wrong = (
                _trackers.read(self.c, name, self.trials) if self.weights else (dict.fromkeys(MIRROR, "-"), [])
            )
            for field in MIRROR:
                why = "" if field in told else f"{name}: not on record"
                self.entry("mirror", field, "R", {name: told.get(field)}, why, "make tracker DO=sync")
            fix = "make tracker DO=sync, with network, or FRESH=1 for another copy; then verify again"
            self.entry("mirror", "values", "C", {name: wrong or "read back"}, "; ".join(wrong[:8]), fix)
        if not used:
            for field, rule in (*((f, "R") for f in MIRROR), ("values", "C")):
                self.entry("mirror", field, rule, {self.c.name: "no tracker: the bundle stands in"})


def _equal(a: Any, b: Any, f: Field) -> bool:
    """Equal but for the slack of the field, which is a share of a budget and a difference elsewhere."""
    if f.slack and isinstance(a, int | float) and isinstance(b, int | float):
        return abs(a - b) <= f.slack * (max(abs(a), abs(b)) if f.group == "budget" else 1.0)
    return a == b


def _told(values: Values, why: str) -> tuple[Values, str]:
    """Of values with parts those that are not the same everywhere, which `why` then names."""
    leaves = [v for by in values.values() for v in by.values()]
    if not all(isinstance(v, Mapping) for v in leaves):
        return values, why
    names = {k for v in leaves for k in v}
    odd = sorted(k for k in names if any(v.get(k) != leaves[0].get(k) for v in leaves))
    cut = {arm: {seed: {k: v.get(k) for k in odd} for seed, v in by.items()} for arm, by in values.items()}
    return cut, f"{why}: {' '.join(odd[:6])}"


def _compact(value: Any) -> Any:
    """One value for all trials or seeds where they agree; a hash in place of what is long."""
    if isinstance(value, Mapping) and value and len({short(v) for v in value.values()}) == 1:
        value = next(iter(value.values()))
    if isinstance(value, Mapping) and len(short_text := str(value)) > 4000:
        return {"sha256": short(value), "items": len(value), "text": len(short_text)}
    return {str(k): v for k, v in value.items()} if isinstance(value, Mapping) else value
