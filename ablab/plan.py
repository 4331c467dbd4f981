# SPDX-License-Identifier: MIT
# Size: expansion, checks, listing and frozen form share one set of facts; apart they could disagree.
"""The only expander: base x steps x axes x seeds to settled trials; their listing and frozen form."""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product, takewhile
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ablab import configure, kconf, study
from ablab.bind import bind
from ablab.kconf import ConfigError, Layer, Request, Settled, Tree
from ablab.machine import Machine
from ablab.study import Axis, Step, Study, StudyError, same

MOST_MICRO = 16  # sequences of an auto micro batch: more gains nothing on a CPU and fits few GPUs
MOST_IMAGES = 128  # the same for images
MEASURED: dict[str, Any] = {"SYS_COMPILE_AUTO": True, "TRAIN_BATCH_MICRO": 0}  # what a GPU decides by trying
LATER = "until it is measured, at the start"
MOST_POINTS = 100_000
LEAST_EVALS = 5
SEED = "TRAIN_SEED"
_QUIET = ("JOBS", "KEEP_GOING", "O", "TRACKER")  # a campaign goes on under other values of these
_POWER = {6: 1.8, 8: 1.2, 10: 1.0}  # pairs -> change in sd of the differences that 80 % of studies would see
_NO_STUDY = Study(name="", path="", text="", base=(), steps=(), axes=(), contrasts=())
Pair = tuple[Axis, str]
Groups = list[list[Axis]]
Auto = tuple[str, bool | int, Request]
"""(symbol, its value that means auto, what stands in for it)."""


class PlanError(ValueError):
    """Why there is no plan; `errors` are the lines of the text."""

    def __init__(self, errors: Iterable[str]) -> None:
        self.errors = tuple(errors)
        super().__init__("\n".join(self.errors))


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyConfig:
    """How a study is run (STUDY_*); nothing here changes a trial's weights."""

    name: str
    """Study file, empty for a single configuration."""
    steps: str
    """Comma list of step ids, empty for all."""
    baseline: str
    """Campaign, or campaign/trial, whose done trials take the place of the first arm's; empty for none."""
    results: Path
    jobs: int
    """Trials at once; 0 is one for each GPU, 1 on a CPU."""
    keep_going: bool
    grace: int
    """Seconds."""
    hang: int
    """Seconds."""
    retry_preempted: int
    retry_interrupted: int
    retry_dead: int
    retry_failed: int
    retry_diverged: int
    retry_oom: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One configuration with one seed."""

    id: str
    hash: str
    group: str
    """The hash without the seed."""
    step: str | None
    """Step id; `placebo1`, .. are copies of the baseline."""
    title: str
    axes: dict[str, str]
    """Key -> item of the axes in force here, without the seed."""
    seed: int
    values: dict[str, Any]
    config: str
    """Full `.config` text."""
    overrides: tuple[str, ...]
    """`CONFIG_X=v` for what differs from the plan's base."""
    origins: dict[str, str]
    """Symbol -> file and line, for what a step or an axis set."""
    superseded: tuple[str, ...]

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return f"{self.id}-{self.hash[:8]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What will run: listing, dry run and campaign are made from it."""

    kind: str
    """`single`, `matrix` or `ablation`."""
    name: str
    """Study or defconfig."""
    study: Study | None
    settings: StudyConfig
    base: Settled
    """What steps and axes change; make line and autos are in it."""
    layers: tuple[Layer, ...]
    """What the base was asked for, without the autos."""
    trials: tuple[Trial, ...]
    """In running order: the seed changes last, so every arm has a result early."""
    skipped: tuple[tuple[dict[str, str], str], ...]
    """Points that cannot be, without the seed, and why."""
    contrasts: tuple[tuple[str, str], ...]
    """Registered pairs of arms, as `arm_text` spells them."""
    factors: dict[str, int]
    """Factor -> number of levels, slowest first."""
    variables: dict[str, str]
    """Those of the make line that act on the plan."""
    measure: str
    """Names what a GPU is to decide; empty if it is to decide nothing."""
    measured: Mapping[str, Any] | None
    """What its decisions rest on; None as long as it has made none."""
    open: dict[str, list[str]]
    """Trial group -> the symbols that it leaves to a GPU."""
    autos: tuple[dict[str, str], ...]
    """{asked, symbol, value, why}: the symbol that left it to the machine, and what stands in for it."""
    changes: tuple[str, ...]
    """How the base differs from the study's base, without a study from the defaults."""
    as_written: bool
    """Whether steps, axes and seeds are those of the study file."""
    hash: str


@dataclass(frozen=True, slots=True)
class _Point:
    """A settled trial without a name."""

    step: str | None
    source: str | None
    """The step whose configuration it has: its own, but the baseline for a placebo."""
    pairs: tuple[Pair, ...]
    """The axes in force and their items."""
    settled: Settled


def expand(
    base_layers: Sequence[Layer],
    variables: Mapping[str, str],
    machine: Machine,
    tree: Tree | None = None,
    name: str = "",
    measured: Mapping[str, Any] = MappingProxyType({}),
) -> Plan:
    """The plan of a configuration on a machine.

    `base_layers` are the lexed `.config`, or defconfig and fragments; of the make line's `variables` SEEDS,
    SWEEP, TRACKER, CONFIG_X and configure.ALIASES act here.  `name` is the plan's if there is no study.  `measured` has
    what the GPU has decided for `Plan.measure` of earlier expansions; without it a plan is provisional there.  Studies
    and defconfigs lie beside the tree's Kconfig.  Raises ConfigError, StudyError or PlanError.
    """
    return _Expander(base_layers, variables, machine, tree or kconf.load(), name, measured).plan()


class _Expander:
    """One expansion: what the configuration asks for, and every point settled so far."""

    def __init__(
        self,
        layers: Sequence[Layer],
        variables: Mapping[str, str],
        machine: Machine,
        tree: Tree,
        name: str,
        measured: Mapping[str, Any],
    ) -> None:
        self.tree, self.machine, self.measured = tree, machine, measured
        self.measure, self.open = "", dict[str, list[str]]()
        acting = {"SEEDS", "SWEEP", "TRACKER", *configure.ALIASES}
        self.variables = {k: v for k, v in variables.items() if k in acting or k.startswith("CONFIG_")}
        self.make = configure.make_layer(self.variables, tree)
        self.layers = (*layers, self.make) if self.make.requests else tuple(layers)
        self.asked = kconf.settle(tree, self.layers)
        self.settings = bind(StudyConfig, "STUDY", self.asked.values, self.asked.where)
        self.study = study.find(self.settings.name, tree.root) if self.settings.name else _NO_STUDY
        self.name = self.study.name or name or _file_names(layers)
        minimal = kconf.lex(Path("base"), self.asked.minimal(), "base").requests
        self.base = Layer("base", tuple(replace(r, where=self.asked.where[r.name]) for r in minimal))
        self.steps: dict[str, Step] = {s.id: s for s in self.study.steps}
        path = self.study.path
        self.bodies = {s.id: kconf.parse(f"step {s.id}", s.lines, path) for s in self.study.steps}
        self.known: dict[Any, Settled | ConfigError] = {}

    def plan(self) -> Plan:
        changes = self._changes()
        self._settle_steps()
        steps, (groups, seeds) = self._planned(), self._axes(self.variables)
        axes = [a for g in [seeds, *groups] for a in g]
        self._check_axes(axes, steps)
        as_written = steps == [*self.steps] and not {"SEEDS", "SWEEP"} & self.variables.keys()
        points, skipped = self._points(steps, groups, seeds)
        autos = self._autos([p.settled.values for p in points])
        base = kconf.settle(self.tree, [self.base, _standing_in(autos, self.asked.values)])
        trials = self._trials(points, autos, base)
        if self.study.expect:
            whole = self._axes({})
            count, gaps = (points, skipped) if as_written else self._points([*self.steps], *whole)
            made, gap = len(self._trials(count, autos, base)), len(gaps) * _size(whole[1])
            if made != self.study.expect:
                text = f"expect {self.study.expect}: the plan has {made} trials, {gap} points skipped"
                raise StudyError(f"{self.study.at('expect')}: error: {text}")
        if problems := _problems(trials):
            raise PlanError(problems)
        factors = [("seeds", len(seeds) and _size(seeds)), ("steps", len(steps))]
        factors += [(" with ".join(a.key for a in g), _size(g)) for g in groups]
        covered = {k: v for k, v in self.variables.items() if k not in _QUIET}
        content = [[t.hash for t in trials], self.study.text, covered]
        plan = Plan(
            kind="ablation" if steps else "matrix" if groups or self.study.name else "single",
            name=self.name,
            study=self.study if self.study.name else None,
            settings=self.settings,
            base=replace(base, superseded=self.asked.superseded),
            layers=self.layers,
            trials=trials,
            skipped=skipped,
            contrasts=self._contrasts(trials, as_written, groups),
            factors={k: n for k, n in factors if n},
            variables=self.variables,
            measure=self.measure,
            measured=self.measured[self.measure]["measured"] if self.measure in self.measured else None,
            open=self.open if self.measure else {},
            autos=tuple({"asked": s, "symbol": r.name, "value": r.text, "why": r.where} for s, _, r in autos),
            changes=changes,
            as_written=as_written,
            hash=_sha(json.dumps(content, sort_keys=True)),
        )
        if self.study.protocol:
            self._check_protocol(plan)
        if as_written:
            _check_used(points, axes)
            _check_looks(plan, self.study)
        return plan

    # what varies

    def _changes(self) -> tuple[str, ...]:
        if not self.study.name:
            return tuple(f"CONFIG_{r.name}={r.text}" for r in self.base.requests)
        folder = self.tree.root / "defconfigs"
        known = sorted(p.name for p in folder.iterdir())
        for name in self.study.base:
            if name not in known:
                text = f"base {name}: no such defconfig; nearest: {kconf.nearest(name, known)}"
                raise StudyError(f"{self.study.at('base')}: error: {text}")
        written = kconf.settle(self.tree, [kconf.lex(folder / name) for name in self.study.base]).text
        got = self.asked.text
        return tuple(
            f"CONFIG_{n}={got.get(n, 'unset')} (was {written.get(n, 'unset')})"
            for n in self.tree.symbols
            if got.get(n) != written.get(n) and kconf.decides(n)
        )

    def _settle_steps(self) -> None:
        errors: dict[str, None] = {}
        for id in self.steps:
            try:
                self._settle(id, ())
            except ConfigError as error:
                errors |= dict.fromkeys(self.study.explain(e) for e in error.errors)
        if errors:
            raise StudyError(*errors)

    def _planned(self) -> list[str]:
        """Ids of the planned steps, in file order."""
        asked = [s for s in self.settings.steps.split(",") if s]
        head = f"{self.asked.where['STUDY_STEPS']}: error: STEPS={self.settings.steps}"
        known = " ".join(self.steps) or "none"
        if errors := [f"{head}: no step {s}; steps: {known}" for s in asked if s not in self.steps]:
            raise PlanError(errors)
        return [s for s in self.steps if s in asked or not asked]

    def _axes(self, variables: Mapping[str, str]) -> tuple[Groups, list[Axis]]:
        """Groups of axes that move together, those of the make line in place; apart, the seed's group."""
        groups = _grouped(self.study.axes)
        sweeps = study.sweep(variables["SWEEP"]) if "SWEEP" in variables else ()
        swept = SEED in {a.key for a in sweeps}
        count = 0 if swept else self.study.seeds or 0
        if (asked := variables.get("SEEDS")) is not None:
            if swept or not re.fullmatch(r"[1-9][0-9]{0,4}", asked):
                why = f"SWEEP= names {SEED} too; keep one" if swept else "not a number of 1 or more"
                raise PlanError([f"make line: error: SEEDS={asked}: {why}"])
            count = int(asked)
        where = "make line" if asked or not count else self.study.at("seeds")
        items = tuple(str(self.asked.values[SEED] + i) for i in range(count))
        seeds = [Axis(key=SEED, items=items, joined=False, where=where)] if count else []
        for new in _grouped([*sweeps, *seeds]):
            other = [{a.key for a in new}.isdisjoint(a.key for a in g) for g in groups]
            at = other.index(False) if False in other else len(groups)
            kept = [g for g, apart in zip(groups, other, strict=True) if apart]
            groups = [*kept[:at], new, *kept[at:]]
        apart = [g for g in groups if g[0].key == SEED]
        return [g for g in groups if g not in apart], apart[0] if apart else []

    def _check_axes(self, axes: Sequence[Axis], steps: Sequence[str]) -> None:
        """Every item has a symbol, and the make line sets nothing that a planned step or axis sets."""
        errors = []
        setters: dict[str, str] = {}
        for step in (s for id in steps for s in self.study.chain(id)):
            for r in self.bodies[step.id].requests:
                text = f"set by step {step.id} of study '{self.name}'; edit the step"
                setters |= dict.fromkeys(self.tree.siblings(r.name) or (r.name,), text)
        counts = "SEEDS" in self.variables or self.study.seeds
        for axis in axes:
            names = dict.fromkeys(self._name((axis, item)) for item in axis.items)
            for name in names:
                if name not in self.tree.symbols:
                    text = f"no such symbol; nearest: CONFIG_{kconf.nearest(name, self.tree.symbols)}"
                    errors.append(f"{axis.where}: error: CONFIG_{name}: {text}")
                elif axis.key != SEED or not counts:  # a count starts at the seed that is asked for
                    ours = axis.where == "make line"
                    how = "by SWEEP=" if ours else f"by study '{self.name}'; change the axis with SWEEP="
                    setters |= dict.fromkeys(self.tree.siblings(name) or (name,), f"swept {how}")
        for r in self.make.requests:
            if r.name in setters:
                errors.append(f"make line: error: CONFIG_{r.name}: {setters[r.name]}")
        if errors:
            raise PlanError(errors)

    def _name(self, pair: Pair) -> str:
        """The symbol that an item sets: the key, or a member of the choice that the key is the prefix of."""
        axis, item = pair
        return axis.key if axis.key in self.tree.symbols else f"{axis.key}_{item}"

    def _request(self, pair: Pair) -> Request:
        axis, item = pair
        name = self._name(pair)
        text = kconf.literal(self.tree, name, item) if name == axis.key else "y"
        return kconf.request(name, text, axis.where)

    # points

    def _settle(self, source: str | None, pairs: Sequence[Pair], autos: Layer | None = None) -> Settled:
        """A step and axes settled, once for equal ones.  Raises ConfigError."""
        key = source, frozenset(pairs), autos
        if key not in self.known:
            chain = [self.bodies[s.id] for s in self.study.chain(source)] if source else []
            sweep = Layer("sweep", tuple(self._request(p) for p in pairs))
            layers = [self.base, *chain, sweep, *([autos] if autos else [])]
            try:
                self.known[key] = kconf.settle(self.tree, layers)
            except ConfigError as error:
                self.known[key] = error
        found = self.known[key]
        if isinstance(found, ConfigError):
            raise found
        return found

    def _points(
        self, steps: Sequence[str], groups: Groups, seeds: Sequence[Axis]
    ) -> tuple[list[_Point], tuple[tuple[dict[str, str], str], ...]]:
        """(the points in running order, those skipped with the reason)."""
        points: dict[Any, _Point] = {}
        skipped: dict[Any, tuple[dict[str, str], str]] = {}
        errors: dict[str, None] = {}
        moves = [range(_size(g)) for g in groups]
        if (total := math.prod(map(len, moves)) * max(1, len(steps)) * _size(seeds)) > MOST_POINTS:
            raise PlanError([f"{self.name}: error: {total:,} points; {MOST_POINTS:,} at most, sweep less"])
        for (step, source, seed), *indices in product(self._arms(steps, seeds), *moves):
            pairs = [(a, a.items[i]) for g, i in zip(groups, indices, strict=True) for a in g]
            try:
                kept, blocked = self._applied(source, [*pairs, *seed])
            except ConfigError as error:
                errors |= dict.fromkeys(error.errors)
                continue
            if blocked is None:
                point = _Point(step, source, kept, self._settle(source, kept))
                points.setdefault((step, kept), point)
                continue
            axes = {"step": step} if step else {}
            axes |= {a.key: i for a, i in (*kept, blocked) if a.key != SEED}
            if (key := tuple(axes.items())) not in skipped:
                skipped[key] = axes, self._reason(source, kept, blocked)
        if errors:
            raise PlanError(errors)
        return list(points.values()), tuple(skipped.values())

    def _arms(self, steps: Sequence[str], seeds: Sequence[Axis]) -> Iterator[tuple[Any, Any, list[Pair]]]:
        """(step, the step whose configuration it has, seed), the seed slowest."""
        copies = self.study.placebo if steps and steps[0] == next(iter(self.steps)) else 0
        for index in range(_size(seeds)):
            seed = [(a, a.items[index]) for a in seeds]
            yield from ((step, step, seed) for step in steps or [None])
            for copy in range(copies):
                taken = [int(i) for i in seeds[0].items] if seeds else [self.asked.values[SEED]]
                item = str(max(taken) + copy * len(taken) + index + 1)
                axis = Axis(key=SEED, items=(item,), joined=False, where=self.study.at("placebo"))
                yield f"placebo{copy + 1}", steps[0], [(axis, item), *seed[1:]]

    def _applied(self, source: str | None, pairs: Sequence[Pair]) -> tuple[tuple[Pair, ...], Pair | None]:
        """(the pairs in force, a pair that its visible choice does not offer or None).

        Each axis is applied once its symbol is visible; what stays invisible collapses.  One that cannot be
        applied, since it would hide others, goes first: so the order in the file does not matter.
        """
        order, moved = list(pairs), []
        while True:
            kept: list[Pair] = []
            left = list(order)
            values = self._settle(source, ()).values
            while ready := next((p for p in left if self._name(p) in values), None):
                try:
                    values = self._settle(source, [*kept, ready]).values
                except ConfigError:
                    if ready in moved:
                        raise
                    break
                kept.append(ready)
                left.remove(ready)
            if ready is None:
                break
            moved.append(ready)
            order = [ready, *(p for p in order if p is not ready)]
        blocked = (p for p in left if any(m in values for m in self.tree.siblings(self._name(p))))
        return tuple(p for p in pairs if p in kept), next(blocked, None)

    def _reason(self, source: str | None, kept: Sequence[Pair], blocked: Pair) -> str:
        self.known.pop((source, frozenset(kept), None))
        self._settle(source, kept)  # again, because the tree explains its latest state
        return f"{self._name(blocked)} {kconf.needs(self.tree, self._name(blocked))}"

    def _autos(self, values: Sequence[Mapping[str, Any]]) -> list[Auto]:
        """What stands in, in every trial alike, for what it leaves to the machine; `where` says why."""
        asked, devices, cores = self.asked.values, len(self.machine.devices), len(self.machine.cores)
        gpu = asked["SYS_DEVICE_CUDA"] or (asked["SYS_DEVICE_AUTO"] and devices > 0)
        jobs = self.settings.jobs or (devices if gpu else 0) or 1
        kind, have = "a GPU" if gpu else "a CPU", f"{devices or 'no'} GPU"
        left = sorted((kconf.group(v), *(s for s, auto in MEASURED.items() if v[s] == auto)) for v in values)
        if gpu and any(row[1:] for row in left):
            self.measure = _sha(json.dumps([list(row) for row in dict.fromkeys(left)]))
        found = self.measured.get(self.measure, {}).get("chosen", {})
        batch = math.gcd(*(v["TRAIN_BATCH_EFFECTIVE"] for v in values if v["TRAIN_BATCH_MICRO"] == 0))
        most = MOST_MICRO if asked["MODEL_GPT"] else MOST_IMAGES
        micro = max(d for d in range(1, most + 1) if batch % d == 0)
        rows: list[tuple[str, bool | int, str, str, str]] = [
            ("SYS_DEVICE_AUTO", True, "SYS_DEVICE_CUDA" if gpu else "SYS_DEVICE_CPU", "y", have),
            ("SYS_COMPILE_AUTO", True, "SYS_COMPILE_ON" if gpu else "SYS_COMPILE_OFF", "y", kind),
            ("SYS_AMP_AUTO", True, "SYS_AMP_BF16" if gpu else "SYS_AMP_OFF", "y", kind),
            ("SYS_THREADS", 0, "SYS_THREADS", str(max(1, cores // jobs)), f"{cores} cores, {jobs} at once"),
            ("TRAIN_BATCH_MICRO", 0, "TRAIN_BATCH_MICRO", str(micro), f"divides {batch}, <= {most}"),
        ]
        if self.measure:
            rows = [(*row[:2], *found.get(row[0], (*row[2:4], LATER))) if row[0] in MEASURED else row for row in rows]
        used = (row for row in rows if any(v[row[0]] == row[1] for v in values))
        return [(symbol, auto, Request(name, text, why)) for symbol, auto, name, text, why in used]

    # trials

    def _trials(self, points: Sequence[_Point], autos: Sequence[Auto], base: Settled) -> tuple[Trial, ...]:
        """The trials; points that resolve alike are one.  Raises StudyError if two steps do."""
        found: dict[str, Trial] = {}
        errors: dict[str, None] = {}
        for p in points:
            settled = self._settle(p.source, p.pairs, _standing_in(autos, p.settled.values))
            trial = self._trial(p, settled, base)
            self.open[trial.group] = [s for s, auto in MEASURED.items() if p.settled.values[s] == auto]
            twin = found.setdefault(trial.hash, trial)
            if twin.step != trial.step:
                text = f"[{p.step}]: resolves to the same configuration as {twin.step}"
                errors[f"{self.study.path}:{self.steps[p.source].line}: error: {text}"] = None
        if errors:
            raise StudyError(*errors)
        count = Counter(t.id for t in found.values())
        return tuple(replace(t, id=_id(t.id, t.seed, t.group[:6])) if count[t.id] > 1 else t for t in found.values())

    def _trial(self, point: _Point, settled: Settled, base: Settled) -> Trial:
        axes = {a.key: i for a, i in point.pairs if a.key != SEED}
        leading = [i for a, i in point.pairs if a.key != SEED and not a.joined]
        title = self.steps[point.source].title if point.source else ""
        if point.step != point.source:
            title = f"A/A copy of {point.source}"
        return Trial(
            id=_id("-".join([point.step or "base", *leading]), settled.values[SEED]),
            step=point.step,
            title=" ".join([title, *(f"{k}={v}" for k, v in axes.items())]).strip() or self.name,
            axes=axes,
            **_facts(self.tree, settled, base),
        )

    def _contrasts(self, trials: Sequence[Trial], as_written: bool, groups: Groups) -> tuple[tuple[str, str], ...]:
        """Each declared contrast at each point of the axes that it does not name; who names an axis names those
        that move with it."""
        # a step without a parent is compared with the baseline, which is on the base as well
        steps = self.study.steps
        defaults = [study.Contrast(left=s.id, right=s.parent or steps[0].id, line=s.line) for s in steps[1:]]
        arms = {arm_text(t.step, t.axes): {"": t.step, **t.axes} for t in trials}
        found: dict[tuple[str, str], None] = {}
        for contrast in self.study.contrasts or defaults:
            wanted = [{"": a} if isinstance(a, str) else dict(a) for a in (contrast.left, contrast.right)]
            left, right = ([a for a in arms if _fits(arms[a], w)] for w in wanted)
            free = {k for arm in arms.values() for k in arm} - {*wanted[0], *wanted[1]}
            free -= {a.key for g in groups if not {*wanted[0], *wanted[1]}.isdisjoint(a.key for a in g) for a in g}
            new = [(a, b) for a, b in product(left, right) if _alike(arms[a], arms[b], free)]
            if not new and as_written:
                text = " - ".join(arm_text(w.pop("", None), w) for w in wanted)
                place = f"{self.study.path}:{contrast.line}"
                raise StudyError(f"{place}: error: contrast {text}: no trials to compare")
            found |= dict.fromkeys(new)
        return tuple(found)

    def _check_protocol(self, plan: Plan) -> None:
        """Raises StudyError unless the arms of every contrast follow one protocol: how they are trained and how fast
        they are pruned is equal but for the factor.

        The factor is what the contrast itself names (axes whose items differ); else what the arms are made of (model,
        pruning method, score); else the first part of the protocol that the fragment of a step names.  What follows
        from a factor by a default is no part of it, nor is what the fragment sets beside it.
        """
        arms = {arm_text(t.step, t.axes): t for t in plan.trials}
        place, errors = f"{self.study.at('protocol')}: error: protocol equal:", dict[str, list[str]]()
        if not plan.contrasts and plan.as_written:
            raise StudyError(f"{place} no arms are compared; declare a contrast")
        for pair in plan.contrasts:
            left, right = (arms[text] for text in pair)
            a, b = (_keyed(self.tree, t.values) for t in (left, right))
            odd = {k for k in a.keys() | b.keys() if a.get(k, ("",))[-1] != b.get(k, ("",))[-1]}
            unequal = [k for k in a if k in odd and k in b and _PROTOCOL.match(k)]
            axes = {k for t in (left, right) for k in t.axes if left.axes.get(k) != right.axes.get(k)}
            moved = {_key(self.tree, k) for k in axes}
            chains = [self.study.chain(t.step) if t.step in self.steps else () for t in (left, right)]
            steps = [s for chain in chains for s in chain if not all(s in c for c in chains)]
            written = [_key(self.tree, r.name) for s in steps for r in self.bodies[s.id].requests]
            treated = moved & a.keys() or any(not _PROTOCOL.match(k) for k in odd)
            factor = moved if treated else {next((k for k in written if k in unequal), "")}
            for k in (k for k in unequal if k not in factor):
                sides = (self._origin(plan, t, name) for t, (name, _) in ((left, a[k]), (right, b[k])))
                errors.setdefault(" against ".join(sides), []).append(" - ".join(pair))
        if errors:
            hint = "set both alike, or make it the only thing in which they differ"
            more = {text: f" and {len(pairs) - 1} more" if pairs[1:] else "" for text, pairs in errors.items()}
            raise StudyError(*(f"{place} {pairs[0]}{more[text]}: {text}; {hint}" for text, pairs in errors.items()))

    def _origin(self, plan: Plan, trial: Trial, name: str) -> str:
        """The line of a trial's configuration that sets a symbol, and where that was asked for."""
        (line,) = (line for line in trial.config.splitlines() if line.startswith(f"CONFIG_{name}="))
        return f"{line} ({trial.origins.get(name) or plan.base.where.get(name, 'default')})"


def arm_text(step: str | None, axes: Mapping[str, str]) -> str:
    """The arm of a trial as contrasts spell it: `R1`, `OPT=SGD PRUNE=NONE`, `S0 PRUNE_STATE_SCORE=RANDOM`."""
    return " ".join([*([step] if step else []), *(f"{k}={v}" for k, v in axes.items())])


_PROTOCOL = re.compile(
    "(OPT|SCHED|DATA|EVAL|SYS|TRAIN)(_|$)|PRUNE_(SPARSITY|INITIAL|CURVE|WARMUP|RAMP|INTERVAL|TIED|SKIP)"
)
_APART = re.compile(f"({'|'.join(kconf.DECORATION)}|TRAIN_(SEED|LOG|CKPT))")


def _key(tree: Tree, name: str) -> str:
    """What a symbol decides: for a member of a choice the choice, for a beta the beta of any optimizer."""
    if siblings := name in tree.symbols and tree.siblings(name):
        words = zip(*(s.split("_") for s in siblings), strict=False)
        return "_".join(w[0] for w in takewhile(lambda w: len({*w}) == 1, words))
    return re.sub(r"^OPT_[A-Z0-9]+_(BETA[12])$", r"OPT_\1", name)


def _keyed(tree: Tree, values: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Key -> (symbol, value) of all that a trial was asked for; an optimizer that has a base is that base."""
    found = {}
    for name, value in values.items():
        choice = tree.siblings(name)
        if tree.symbols[name].prompt and (value is True or not choice) and not _APART.match(name):
            found[_key(tree, name)] = name, name if choice else value
    for key, (name, _) in list(found.items()):
        if base := found.pop(f"{name}_BASE", None):
            found[key] = base[0], base[0].replace(f"{name}_BASE", key)
    return found


def _fits(arm: Mapping[str, Any], wanted: Mapping[str, str]) -> bool:
    return all(arm.get(k) is not None and same(arm[k]) == same(v) for k, v in wanted.items())


def _alike(a: Mapping[str, Any], b: Mapping[str, Any], keys: set[str]) -> bool:
    """Equal in `keys`; an axis that one of the two lacks has collapsed there and matches every item."""
    return all(a[k] == b[k] for k in keys if k in a and k in b)


def _grouped(axes: Iterable[Axis]) -> Groups:
    groups: Groups = []
    for axis in axes:
        if axis.joined:
            groups[-1].append(axis)
        else:
            groups.append([axis])
    return groups


def _size(group: Sequence[Axis]) -> int:
    return len(group[0].items) if group else 1


def _standing_in(autos: Sequence[Auto], values: Mapping[str, Any]) -> Layer:
    return Layer("auto", tuple(request for symbol, auto, request in autos if values[symbol] == auto))


def _facts(tree: Tree, settled: Settled, base: Settled) -> dict[str, Any]:
    """The fields of a Trial that follow from its configuration."""
    changed = [n for n, t in settled.text.items() if base.text.get(n) != t and tree.symbols[n].prompt]
    shown = [n for n in changed if settled.values[n] is not False or not tree.siblings(n)]
    return {
        "hash": kconf.identity(settled.values),
        "group": kconf.group(settled.values),
        "seed": settled.values[SEED],
        "values": settled.values,
        "config": settled.config(),
        "overrides": tuple(f"CONFIG_{n}={settled.text[n]}" for n in shown),
        "origins": {n: settled.where[n] for n in changed if n in settled.where},
        "superseded": settled.superseded,
    }


def _id(text: str, seed: int, mark: str = "") -> str:
    """A name of at most 80 characters that ends in the seed; `mark` tells equal ones apart."""
    stem = re.sub(r"[^a-z0-9.]+", "-", re.sub(r"\.\.+", ".", text.lower().removesuffix(f"-s{seed}")))
    return "-".join([stem.strip("-.")[:60], *([mark] if mark else []), f"s{seed}"])


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _file_names(layers: Sequence[Layer]) -> str:
    places = [Path(r.where.rpartition(":")[0]) for layer in layers for r in layer.requests]
    return "-".join(dict.fromkeys(p.name for p in places if p.parent.name == "defconfigs")) or "config"


# What is refused before anything exists


def _check_used(points: Sequence[_Point], axes: Sequence[Axis]) -> None:
    """Every item of the file is in force somewhere."""
    used = {(a.key, i) for p in points for a, i in p.pairs}
    unused = [(a, i) for a in axes for i in a.items if (a.key, i) not in used]
    why = "no trial uses it; everywhere the item is blocked or its axis invisible"
    if unused:
        raise StudyError(*(f"{a.where}: error: {a.key} = {i}: {why}" for a, i in unused))


def _budget_kind(values: Mapping[str, Any]) -> str:
    return next(k for k in ("steps", "tokens", "epochs", "time") if values[f"TRAIN_BUDGET_{k.upper()}"])


def _steps(values: Mapping[str, Any]) -> int | None:
    """Optimizer steps of a trial, None if data or speed decide."""
    if values["TRAIN_BUDGET_TOKENS"]:
        return -(-values["TRAIN_TOKENS"] // _step_tokens(values))
    return values.get("TRAIN_STEPS")


def _step_tokens(values: Mapping[str, Any]) -> int:
    return values["TRAIN_BATCH_EFFECTIVE"] * values.get("MODEL_GPT_BLOCK", 1)


def flaws(v: Mapping[str, Any], samples: int | None = None) -> Iterator[str]:
    """A batch that does not divide, a budget that can show nothing; one of epochs once their `samples` are known."""
    batch, micro, interval = v["TRAIN_BATCH_EFFECTIVE"], v["TRAIN_BATCH_MICRO"], v["EVAL_INTERVAL"]
    if batch % micro:
        text = f"CONFIG_TRAIN_BATCH_MICRO={micro}: does not divide CONFIG_TRAIN_BATCH_EFFECTIVE={batch}"
        yield f"{text}; choose a divisor, or 0 for auto"
    steps = _steps(v)
    if samples and v["TRAIN_BUDGET_EPOCHS"]:
        steps = -(-v["TRAIN_EPOCHS"] * samples // batch)
    if steps is None:
        return
    budget, evals = f"CONFIG_TRAIN_{_budget_kind(v).upper()}", -(-steps // interval) if interval else None
    if v["SCHED_WARMUP"] >= steps:
        text = f"CONFIG_SCHED_WARMUP={v['SCHED_WARMUP']}: the budget ends inside the warm-up, after {steps} steps"
        yield f"{text}; lower it or raise {budget}"
    begin = max(v.get("SCHED_COUPLING_START", 0), v.get("SCHED_COUPLING_WINDOW", 0))
    if min(begin, v.get("SCHED_COUPLING_DEADLINE") or begin) >= steps:
        name = "START" if begin == v["SCHED_COUPLING_START"] else "WINDOW"
        text = f"CONFIG_SCHED_COUPLING_{name}={begin}: the budget ends before any coupling starts, after {steps} steps"
        yield f"{text}; lower it or raise {budget}"
    if "PRUNE_WARMUP" in v:
        fixed = v["PRUNE_RAMP_BY_STEP"]
        end = v["PRUNE_RAMP_STEP"] if fixed else int(v["PRUNE_RAMP_FRACTION"] * steps)
        if not v["PRUNE_WARMUP"] < end <= steps:
            text = f"CONFIG_PRUNE_WARMUP={v['PRUNE_WARMUP']}: the ramp of pruning must end after it and within"
            cause = f"CONFIG_PRUNE_RAMP_{'STEP' if fixed else 'FRACTION'} ends it at step {end}"
            yield f"{text} {steps} steps, but {cause}; lower what is beyond, or raise {budget}"
    if evals is not None and evals < LEAST_EVALS:
        text = f"CONFIG_EVAL_INTERVAL={interval}: {evals} evaluations in {steps} steps, {LEAST_EVALS} or more"
        yield f"{text} are needed; lower it or raise {budget}"


def _problems(trials: Sequence[Trial]) -> list[str]:
    """The flaws, each with a trial that has it."""
    found: dict[str, list[str]] = {}
    for trial, flaw in ((t, flaw) for t in trials for flaw in flaws(t.values)):
        found.setdefault(flaw, []).append(trial.id)
    more = {flaw: f" and {len(ids) - 1} more" if ids[1:] else "" for flaw, ids in found.items()}
    return [f"{ids[0]}{more[flaw]}: error: {flaw}" for flaw, ids in found.items()]


# What n can show


def smallest_p(n: int, paired: bool, sides: int = 2) -> float:
    """The smallest p that n pairs, or n trials in each of two arms, can reach in an exact test."""
    return min(1.0, sides / (2 ** n if paired else math.comb(2 * n, n)))


def _needed_p(plan: Plan, s: Study) -> float:
    """What the smallest p of the family must reach at a look, by Holm."""
    return s.alpha / max(1, len(s.looks)) / max(1, len(plan.contrasts))


def _check_looks(plan: Plan, s: Study) -> None:
    """Every registered look can decide."""
    have, need = plan.factors.get("seeds", 1), _needed_p(plan, s)
    smallest = {n: smallest_p(n, s.paired, s.sides) for n in s.looks}
    errors = [f"look {n}: the plan has {have} seeds" for n in smallest if n > have]
    weak = [(n, f"smallest p {p:.2g}, needs {need:.2g}") for n, p in smallest.items() if p > need]
    errors += [f"look {n}: cannot decide; {why}" for n, why in weak]
    if errors:
        raise StudyError(*(f"{s.at('looks')}: error: {e}" for e in errors))


def power(plan: Plan) -> list[str]:
    """What the planned seeds can decide, as lines of text."""
    s, n = plan.study, plan.factors.get("seeds", 1)
    if not s or not plan.contrasts:
        return ["nothing is decided: no contrast is declared"]
    need, p = _needed_p(plan, s), smallest_p(n, s.paired, s.sides)
    enough = next(k for k in range(1, 10_000) if smallest_p(k, s.paired, s.sides) <= need)
    unit, sides = "pairs" if s.paired else "seeds in each arm", "two" if s.sides == 2 else "one"
    word = "can decide" if p <= need else f"cannot decide at this n; {enough} can"
    family = f"Holm over {len(plan.contrasts)}" + (f" at {len(s.looks)} looks" if s.looks else "")
    lines = [f"{unit}: {n}, smallest {sides}-sided p {p:.2g}, {family} needs {need:.2g}: {word}"]
    if s.paired and 1 < n < 8:
        lines.append(f"range of the {n} differences = {100 * (1 - smallest_p(n, True)):.4g} % interval")
    if s.paired and n in _POWER and p <= need:
        lines.append(f"change seen at 80 % power, before Holm: {_POWER[n]} sd of the differences")
    return lines


# Text and files


def listing(plan: Plan, forecast: Iterable[str] = ()) -> str:
    """What `make plan` prints, with these lines about time and memory."""
    trials, s = plan.trials, plan.study
    why = {"ablation": "the study has steps", "matrix": "something is swept", "single": "nothing is swept"}
    total, gaps = math.prod(plan.factors.values()), len(plan.skipped) * plan.factors.get("seeds", 1)
    copies = sum(t.step is not None and t.step.startswith("placebo") for t in trials)
    alike = total - gaps - (len(trials) - copies)
    facts = [
        ("plan", f"{plan.name}, {plan.hash[:6]}"),
        ("kind", f"{plan.kind}, because {why[plan.kind]}"),
        ("factors", " x ".join(f"{k} {n}" for k, n in plan.factors.items()) or "one configuration"),
        ("count", f"trials: {len(trials)}" + (f", {copies} of them placebo" if copies else "")),
    ]
    facts += [("", f"points skipped: {gaps}")] if gaps else []
    facts += [("", f"points equal to others, an axis has no effect there: {alike}")] if alike else []
    facts += [("question", s.question)] if s and s.question else []
    facts += [("changed", "steps, axes or seeds of the file")] if s and not plan.as_written else []
    against = f"{' + '.join(s.base)}" if s else "defaults"
    facts += [("base", f"{against}, {c}") for c in plan.changes or ["unchanged"]]
    facts += [("superseded", line) for line in plan.base.superseded]
    facts += [("batch", line) for line in dict.fromkeys(_batch(t.values) for t in trials)]
    facts += [("budget", line) for line in dict.fromkeys(_budget(t.values) for t in trials)]
    facts += [("auto", f"CONFIG_{a['symbol']}={a['value']} ({a['why']})") for a in plan.autos]
    facts += [("forecast", line) for line in forecast]
    facts += [("width", line) for line in dict.fromkeys(w for t in trials for w in _widths(t.values))]
    facts += [("skip", f"{arm_text(None, axes)}: {reason}") for axes, reason in plan.skipped]
    facts += [("contrast", f"{left} - {right}") for left, right in plan.contrasts]
    facts += [("protocol", "equal but for the factor of each contrast")] if s and s.protocol else []
    facts += [("n can show", line) for line in power(plan)] if s or len(trials) > 1 else []
    wide = max(len(t.id) for t in trials)
    lines = [f"{name:<12}{text}" for name, text in facts]
    lines += ["", f"{'trial':<{wide}}  hash      title: changes"]
    for t in trials:
        changed = " ".join(o for o in t.overrides if not o.startswith(f"CONFIG_{SEED}="))
        lines.append(f"{t.id:<{wide}}  {t.hash[:8]}  {t.title}" + (f": {changed}" if changed else ""))
    undone = ((t.step or "base", line) for t in trials for line in t.superseded)
    seedless = dict.fromkeys(u for u in undone if not u[1].startswith(f"CONFIG_{SEED}="))
    lines += [f"superseded in {step}: {line}" for step, line in seedless]
    return "\n".join(lines) + "\n"


def _batch(values: Mapping[str, Any]) -> str:
    batch, micro = values["TRAIN_BATCH_EFFECTIVE"], values["TRAIN_BATCH_MICRO"]
    formula = f"micro {micro} x accumulation {batch // micro} x world 1 = {batch} effective"
    return f"{formula}, {_step_tokens(values):,} {_unit(values)} a step"


def _unit(values: Mapping[str, Any]) -> str:
    return "tokens" if values["MODEL_GPT"] else "images"


def _budget(values: Mapping[str, Any]) -> str:
    kind, steps = _budget_kind(values), _steps(values)
    limit = f"{values[f'TRAIN_{kind.upper()}']:,} {'seconds' if kind == 'time' else kind}"
    size = f" = {steps:,} steps" if steps and kind != "steps" else ""
    size += f" = {steps * _step_tokens(values):,} {_unit(values)}" if steps and kind != "tokens" else ""
    interval = values["EVAL_INTERVAL"]
    return f"{limit}{size}, an evaluation every {f'{interval:,} steps' if interval else 'epoch'}"


def _widths(values: Mapping[str, Any]) -> Iterator[str]:
    """Widths that tensor cores take badly: those off multiples of 64."""
    names = [n for n, v in values.items() if re.search("_(EMBED|WIDTH|VOCAB|LATENT|DIM|RANK)$", n) and v is not True]
    named = {f"CONFIG_{n}": values[n] for n in names}
    if "MODEL_GPT_HEADS" in values:
        named["width of a head"] = values["MODEL_GPT_EMBED"] // values["MODEL_GPT_HEADS"]
    yield from (f"{name} = {width}: off multiples of 64" for name, width in named.items() if width % 64)


def as_json(plan: Plan) -> dict[str, Any]:
    """The list of trials that the dry run reads."""
    names = ("id", "hash", "title", "config")
    return {"trials": [{n: getattr(t, n) for n in names} for t in plan.trials]}


def frozen(
    plan: Plan,
    *,
    name: str,
    created: str,
    code: Mapping[str, Any],
    data: Mapping[str, Any],
    check: Mapping[str, Any],
    executor: str = "local",
    forecast: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """The content of campaign.json; `forecast` has mem_gib and hours for each trial group."""
    s, settings = plan.study, plan.settings
    retries = ("preempted", "interrupted", "dead", "failed", "diverged", "oom")
    lines = [(layer.name, "\n".join(f"{r.name}={r.text}" for r in layer.requests)) for layer in plan.layers]
    layers = [{"origin": origin, "sha256": _sha(text)} for origin, text in lines]
    origins = {n: where for n, where in plan.base.where.items() if where != "default"}
    return {
        "name": name,
        "created": created,
        "kind": plan.kind,
        "plan": plan.hash,
        "study": {"name": s.name, "text": s.text, "sha256": _sha(s.text)} if s else None,
        "base": {"layers": layers, "config": plan.base.config(), "origins": origins},
        "make_vars": plan.variables,
        "trials": [record(t, (forecast or {}).get(t.group)) for t in plan.trials],
        "skipped": [{"axes": axes, "reason": reason} for axes, reason in plan.skipped],
        "contrasts": [list(pair) for pair in plan.contrasts],
        "registration": registration(plan),
        "auto": {f"CONFIG_{a['symbol']}={a['value']}": a["why"] for a in plan.autos},
        "policy": {
            "keep_going": settings.keep_going,
            "retries": {r: getattr(settings, f"retry_{r}") for r in retries},
            "grace_s": settings.grace,
            "hang_s": settings.hang,
        },
        "code": dict(code),
        "data": dict(data),
        "check": dict(check),
        "executor": executor,
    }


def evidence(plan: Plan, machine: Machine) -> dict[str, Any]:
    """The content of auto.json: what stands in for each auto, why, and the machine that it was found on."""
    devices = [f"{d.name} {d.uuid}, {d.memory_bytes >> 20} MiB" for d in machine.devices]
    facts = {"cpu": machine.cpu, "cores": len(machine.cores), "memory_bytes": machine.memory_bytes}
    found = {"machine": facts | {"devices": devices}, "chosen": list(plan.autos)}
    return found | ({"measured": plan.measured} if plan.measured else {})


def record(trial: Trial, forecast: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A trial as campaign.json and amendments hold it."""
    names = ("id", "hash", "group", "step", "title", "axes", "seed", "overrides", "origins", "superseded")
    v, mem_gib = trial.values, max(forecast["mem_gib"]) if forecast else 0.0
    resources = {"gpus": int(v["SYS_DEVICE_CUDA"]), "cpus": v["SYS_THREADS"], "mem_gib": mem_gib}
    return {**{n: getattr(trial, n) for n in names}, "resources": resources, "forecast": forecast}


def registration(plan: Plan) -> dict[str, Any]:
    """What the study declares before anything runs; the defaults without one."""
    s = plan.study or _NO_STUDY
    names = ("question", "margin", "alpha", "sides", "placebo", "looks", "failures", "protocol", "paired")
    return {
        **{n: getattr(s, n) for n in names},
        "metric": {"key": s.metric[0], "mode": s.metric[1]},
        "budget": s.budget or _budget_kind(plan.base.values),
        "seeds": plan.factors.get("seeds", 1),
        "as_written": plan.as_written,
    }


def amended(content: Mapping[str, Any], count: int, tree: Tree | None = None) -> tuple[Trial, ...]:
    """`count` further seeds for every arm of a campaign.  `content` is that of campaign.json, with the trials
    of earlier amendments in `trials`.

    Placebo arms keep seeds of their own.  Raises PlanError if this Kconfig tree makes something else of the
    campaign's trials: then new ones could not be compared with them.
    """
    tree = tree or kconf.load()
    base = kconf.settle(tree, [kconf.lex(Path(".config"), content["base"]["config"])])
    minimal = kconf.lex(Path("base"), base.minimal(), "base")
    arms = {(t["step"], t["group"]): t for t in content["trials"]}
    copies = list(dict.fromkeys(s for s, _ in arms if s and s.startswith("placebo")))
    top = max(t["seed"] for t in content["trials"])
    found = []
    for index, ((step, group), t) in product(range(count), arms.items()):
        seed = top + 1 + index + count * (copies.index(step) + 1 if step in copies else 0)
        lines = dict(o.removeprefix("CONFIG_").split("=", 1) for o in t["overrides"]) | {SEED: str(seed)}
        layer = Layer("amend", tuple(kconf.request(n, text, t["id"]) for n, text in lines.items()))
        settled = kconf.settle(tree, [minimal, layer])
        if kconf.group(settled.values) != group:
            raise PlanError([f"{t['id']}: error: this Kconfig tree makes another trial of it; use its code"])
        stem = t["id"].removesuffix(f"-s{t['seed']}")
        names = {"id": f"{stem}-s{seed}", "step": step, "title": t["title"], "axes": t["axes"]}
        found.append(Trial(**names, **_facts(tree, settled, base)))
    return tuple(found)
