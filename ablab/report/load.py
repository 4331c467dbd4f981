# SPDX-License-Identifier: MIT
"""A campaign folder as the report sees it: trials with states and values, arms, contrasts, registration."""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ablab import kconf, metrics, plan, rundir
from ablab.journal import Entry, Journal, Replay, TrialState
from ablab.report import certificate, index
from ablab.report.index import Columns

DAMAGED = "damaged"
_STEP = re.compile(r"\[\s*([A-Z0-9]{1,8})\s*(?::\s*([A-Z0-9]{1,8})\s*)?\]")


class QueryError(ValueError):
    """A selector that is ambiguous, or a condition of bad form: exit 2."""


class NothingError(QueryError):
    """What was asked for does not exist: exit 1."""

    exit_code = 1


class Curves:
    """What has rows by column: metrics over an axis."""

    columns: Columns

    def curve(self, key: str, axis: str = "step") -> tuple[np.ndarray, np.ndarray]:
        """(axis, value) of a metric where both are finite."""
        at, y = self.columns.get(key)
        x = self.columns.axis(axis)[at]
        known = np.isfinite(x) & np.isfinite(y)
        return x[known], y[known]

    def points(self, key: str, axis: str = "step") -> list[tuple[float, float]]:
        """The same as pairs."""
        return list(zip(*(side.tolist() for side in self.curve(key, axis)), strict=True))

    def over(self, key: str, mode: str) -> float | None:
        """All points of a metric as one number: `final`, `min`, `max`, `sum`, or `mean` weighted by the training
        time that each stands for; None without a point.

        While a pruner ramps up the network is denser than the one that is compared: the extremes are those at the last
        sparsity.
        """
        seconds, values = self.curve(key, "train_s")
        if not len(values):
            seconds, values = self.curve(key, "wall_s")  # of a tracker, which has no other clock
        if mode != "mean":
            steps, values = self.curve(key)  # a row without a clock counts
        if not len(values):
            return None
        if mode == "final":
            return float(values[-1])
        if mode == "mean":
            weights = np.diff(seconds, prepend=0)
            return float(np.average(values, weights=weights if weights.sum() > 0 else None))
        if mode in ("min", "max"):
            values = values[steps >= rundir.settled_from(self.points("sparsity/target"))]
        return float({"min": np.min, "max": np.max, "sum": np.sum}[mode](values))


@dataclass(frozen=True)
class Trial(Curves):
    """One trial.  `state` is the journal's, but `done` only if DONE verifies, and `damaged` if the journal
    says done and DONE does not; `reason` says why there is no result."""

    dir: rundir.TrialDir
    record: Mapping[str, Any]
    entry: Entry
    rehash: bool = False
    """Hash all that DONE vouches for, whatever the index knows."""
    fate: tuple[str, str] | None = None
    """State and reason where a caller knows better; else they are found when first asked for."""

    @cached_property
    def _fate(self) -> tuple[str, str]:
        if self.fate:
            return self.fate
        flaw = self.dir.flaw() if self.rehash else index.flaw(self.dir)
        if flaw is None:
            return TrialState.DONE.value, ""
        if self.entry.state is TrialState.DONE:
            return DAMAGED, flaw
        return self.entry.state.value, ": ".join(p for p in (self.entry.cls, self.entry.reason) if p)

    @property
    def state(self) -> str:
        return self._fate[0]

    @property
    def reason(self) -> str:
        return self._fate[1]

    @property
    def attempt(self) -> int:
        return self.entry.attempt

    @property
    def campaign(self) -> str:
        return self.dir.campaign.name

    @property
    def hash(self) -> str:
        return str(self.record["hash"])

    @property
    def step(self) -> str | None:
        return self.record["step"]

    @property
    def primary(self) -> tuple[str, str]:
        """Key and mode of the metric that its campaign registered."""
        metric = self.dir.campaign.content["registration"]["metric"]
        return metric["key"], metric["mode"]

    @cached_property
    def columns(self) -> Columns:
        """Its rows by column, all attempts merged."""
        return index.columns(self.dir)

    @property
    def id(self) -> str:
        return str(self.record["id"])

    @property
    def seed(self) -> int:
        return int(self.record["seed"])

    @property
    def is_done(self) -> bool:
        return self.state == TrialState.DONE

    @property
    def is_open(self) -> bool:
        """True if it has not ended, or stopped and can go on."""
        return self.state in (
            TrialState.QUEUED,
            TrialState.RUNNING,
            TrialState.PREEMPTED,
            TrialState.INTERRUPTED,
        )

    @property
    def is_lost(self) -> bool:
        """True if it ended without a result."""
        return not self.is_done and not self.is_open

    @property
    def place(self) -> str:
        """Its folder, from the campaign's."""
        return self.dir.path.relative_to(self.dir.campaign.path).as_posix()

    @cached_property
    def summary(self) -> Mapping[str, Any] | None:
        """Content of summary.json, of a done trial only: nothing else is ranked."""
        return self.dir.summary() if self.is_done else None

    @cached_property
    def values(self) -> dict[str, str]:
        """Symbol -> literal of its resolved configuration."""
        return self._sound(lambda: {r.name: r.text for r in kconf.lex(self.dir.config).requests if r.name})

    @property
    def built(self) -> Mapping[str, Any]:
        """What was built; empty before that."""
        return self._sound(self.dir.built)

    def _sound(self, read: Callable[[], Any]) -> Any:
        """What is read; nothing where the trial is damaged, which its reason tells: one file does not take the others
        away."""
        try:
            return read() or {}
        except ValueError:
            if self.state != DAMAGED:
                raise
            return {}

    @cached_property
    def manifest(self) -> Mapping[str, Any]:
        """What ran, but for `config`, of which `values` tells and which is most of it; empty before that."""
        return {k: v for k, v in self._sound(self.dir.manifest).items() if k != "config"}

    @property
    def final(self) -> Mapping[str, float]:
        """Last values of what ranks a trial."""
        return self.summary["final"] if self.summary else {}

    @property
    def arm(self) -> str:
        """Step and axes, as contrasts name it; `base` in a plan of one configuration."""
        return plan.arm_text(self.record["step"], self.record["axes"]) or "base"

    @property
    def base(self) -> Mapping[str, str]:
        """The frozen configuration of its campaign, before steps and axes."""
        return _base(self.dir.campaign.content["base"]["config"])

    @property
    def decays(self) -> bool:
        """True if its learning rate falls until the end, so that an earlier row is no result."""
        return self.values.get("SCHED_CONSTANT") != "y"

    @property
    def peak_gib(self) -> float | None:
        return self.summary["perf"]["peak_mem_bytes"] / 2**30 if self.summary else None

    def setter(self, symbol: str) -> str:
        """The arm where step or axes change a symbol, else the base of the campaign."""
        changed = any(text.startswith(f"CONFIG_{symbol}=") for text in self.record["overrides"])
        return plan.arm_text(self.record["step"], self.record["axes"]) if changed else "base"

    def rows(self, *keys: str) -> list[dict[str, Any]]:
        """Its rows, or those with these metrics, all attempts merged."""
        return self.columns.rows(keys) if keys else list(rundir.rows(self.dir))

    def value(self, key: str, mode: str = "final") -> float | None:
        """The metric as `over` has it; None for a trial without it or not done."""
        if self.summary is None:
            return None
        if mode == "final" and key in self.summary["final"]:
            return float(self.summary["final"][key])
        return self.over(key, mode)


@dataclass(frozen=True)
class Arm:
    """The trials of a step, or of one point of the axes, that differ in the seed only."""

    text: str
    """`[STEP] [KEY=item ..]`, as contrasts name it."""
    title: str
    """Of the step, without the axes that `text` names."""
    step: str | None
    axes: Mapping[str, str]
    trials: tuple[Trial, ...]

    @property
    def label(self) -> str:
        """Its text; `base` in a plan of one configuration."""
        return self.text or "base"

    def by_seed(self, key: str, mode: str) -> dict[int, float]:
        """Values of the done trials."""
        found = {t.seed: t.value(key, mode) for t in self.trials}
        return {seed: value for seed, value in found.items() if value is not None}


@dataclass(frozen=True)
class Loaded:
    """A campaign: frozen plan, states, trials in plan order, arms in study order."""

    dir: rundir.Campaign
    content: Mapping[str, Any]
    trials: tuple[Trial, ...]
    arms: Mapping[str, Arm]
    replay: Replay

    @property
    def name(self) -> str:
        return self.dir.name

    @property
    def registered(self) -> Mapping[str, Any]:
        """question metric budget margin alpha sides placebo looks failures seeds paired as_written."""
        return self.content["registration"]

    @property
    def key(self) -> str:
        return str(self.registered["metric"]["key"])

    @property
    def mode(self) -> str:
        return str(self.registered["metric"]["mode"])

    @property
    def metric(self) -> metrics.Metric:
        return metrics.get(self.key)

    @property
    def what(self) -> str:
        """The metric in words: `val_loss (nats/token, lower is better), final`."""
        better = f", {self.metric.better} is better" if self.metric.better else ""
        return f"{self.key} ({self.metric.unit}{better}), {self.mode}"

    @cached_property
    def certified(self) -> str | None:
        """Identity of its certificate if one was issued and still holds; all that it vouches for is hashed once."""
        return certificate.valid(self.dir)

    @cached_property
    def parents(self) -> dict[str, str]:
        """Step -> the step it is compared with where no contrast says otherwise; the first has none."""
        study = self.content["study"]
        headers = [m for text in (study["text"].splitlines() if study else ()) if (m := _STEP.match(text))]
        return {m[1]: m[2] or headers[0][1] for m in headers[1:]}

    def pairs(self) -> list[tuple[Arm, Arm, bool]]:
        """(left, right, registered): the registered contrasts and, exploratory, each further step against its
        parent, in the order of the left arms."""
        known = [tuple(pair) for pair in self.content["contrasts"]]
        found = {p: True for p in known if p[0] in self.arms and p[1] in self.arms}
        for arm in self.arms.values():
            other = plan.arm_text(self.parents.get(arm.step or ""), arm.axes)
            if arm.step in self.parents and other in self.arms and not any(p[0] == arm.text for p in known):
                found[arm.text, other] = False
        order = list(self.arms)
        ranked = sorted(found.items(), key=lambda p: (order.index(p[0][0]), order.index(p[0][1])))
        return [(self.arms[a], self.arms[b], registered) for (a, b), registered in ranked]

    def placebos(self) -> list[tuple[Arm, Arm]]:
        """(copy, baseline) of every placebo arm."""
        steps = [a.step for a in self.arms.values()]
        copies = [a for a in self.arms.values() if (a.step or "").startswith("placebo")]
        return [(c, self.arms[plan.arm_text(steps[0], c.axes)]) for c in copies]

    def inputs(self) -> str:
        """SHA-256 over campaign.json and the DONE of every done trial, which vouches for what was read."""
        marks = [f"campaign {self.dir.hash}"]
        marks += [f"{t.dir.name} {rundir.stamp(t.dir.file('done'))['sha256']}" for t in self.trials if t.is_done]
        return hashlib.sha256("\n".join(marks).encode()).hexdigest()


def read(campaign: rundir.Campaign | Path, rehash: bool = False) -> Loaded:
    """Load a campaign.  Raises RunError when its plan is damaged; a damaged trial is listed, not raised.

    A trial whose DONE was verified before, and whose files have not changed since by inode, size and times, counts
    as done; `rehash` hashes all of them again.
    """
    folder = campaign if isinstance(campaign, rundir.Campaign) else rundir.Campaign.open(campaign)
    replay = Journal.of(folder).replay()
    trials = tuple(Trial(t, t.record, replay.entry(t.name), rehash) for t in folder.trials())
    arms: dict[str, list[Trial]] = {}
    for t in trials:
        arms.setdefault(plan.arm_text(t.record["step"], t.record["axes"]), []).append(t)
    made = {text: _arm(text, members) for text, members in arms.items()}
    return Loaded(folder, folder.content, trials, made, replay)


@cache
def _base(config: str) -> Mapping[str, str]:
    return {r.name: r.text for r in kconf.lex(Path(), config).requests if r.name}


def _arm(text: str, trials: Sequence[Trial]) -> Arm:
    first = trials[0].record
    title = str(first["title"]).removesuffix(plan.arm_text(None, first["axes"])).strip()
    return Arm(text, title, first["step"], first["axes"], tuple(trials))


def flat(value: Any, at: str = "") -> Iterator[tuple[str, str]]:
    """Leaves of nested JSON by dotted path, as text."""
    if isinstance(value, Mapping | list):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in items:
            yield from flat(inner, f"{at}.{key}" if at else str(key))
    elif at != "schema":
        yield at, str(value)


def unit(name: str) -> str | None:
    """Of a metric; None for a name of somebody else."""
    try:
        return metrics.get(name).unit
    except metrics.MetricError:
        return None
