# SPDX-License-Identifier: MIT
"""A campaign folder as the report sees it: trials with states and values, arms, contrasts, registration."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ablab import kconf, metrics, plan, rundir
from ablab.journal import Journal, Replay, TrialState

DAMAGED = "damaged"
_STEP = re.compile(r"\[\s*([A-Z0-9]{1,8})\s*(?::\s*([A-Z0-9]{1,8})\s*)?\]")


@dataclass(frozen=True)
class Trial:
    """One trial.  `state` is the journal's, but `done` only if DONE verifies, and `damaged` if the journal
    says done and DONE does not; `reason` says why there is no result."""

    dir: rundir.TrialDir
    record: Mapping[str, Any]
    state: str
    reason: str
    attempt: int

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
        return {r.name: r.text for r in kconf.lex(self.dir.config).requests if r.name}

    def rows(self, *keys: str) -> list[dict[str, Any]]:
        """Its rows with these metrics, all attempts merged."""
        return list(rundir.rows(self.dir, keys or None))

    def points(self, key: str, axis: str = "step") -> list[tuple[float, float]]:
        """(axis, value) of a metric where it is finite."""
        if (key, axis) not in self._points:
            rows = (r for r in self.rows(key) if r["m"].get(key) is not None)
            self._points[key, axis] = [(r[axis], r["m"][key]) for r in rows]
        return self._points[key, axis]

    @cached_property
    def _points(self) -> dict[tuple[str, str], list[tuple[float, float]]]:
        return {}

    def value(self, key: str, mode: str = "final") -> float | None:
        """The metric at the end, its minimum or its maximum; None for a trial without it or not done.

        While a pruner ramps up the network is denser than the one that is compared: the extremes are those at the last
        sparsity.
        """
        if self.summary is None:
            return None
        if mode == "final" and key in self.summary["final"]:
            return float(self.summary["final"][key])
        levels = self.points("sparsity/target")
        since = next((step for step, level in levels if level == levels[-1][1]), 0)
        values = [value for step, value in self.points(key) if step >= since]
        pick = {"final": lambda v: v[-1], "min": min, "max": max}[mode]
        return float(pick(values)) if values else None


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


def read(campaign: rundir.Campaign | Path) -> Loaded:
    """Load a campaign.  Raises RunError when its plan is damaged; a damaged trial is listed, not raised."""
    folder = campaign if isinstance(campaign, rundir.Campaign) else rundir.Campaign.open(campaign)
    replay = Journal.of(folder).replay()
    trials = tuple(_trial(t, replay) for t in folder.trials())
    arms: dict[str, list[Trial]] = {}
    for t in trials:
        arms.setdefault(plan.arm_text(t.record["step"], t.record["axes"]), []).append(t)
    made = {text: _arm(text, members) for text, members in arms.items()}
    return Loaded(folder, folder.content, trials, made, replay)


def _trial(folder: rundir.TrialDir, replay: Replay) -> Trial:
    entry, flaw = replay.entry(folder.name), folder.flaw()
    state, reason = entry.state.value, ": ".join(p for p in (entry.cls, entry.reason) if p)
    if flaw is None:
        state, reason = TrialState.DONE.value, ""
    elif entry.state is TrialState.DONE:
        state, reason = DAMAGED, flaw
    return Trial(folder, folder.record, state, reason, entry.attempt)


def _arm(text: str, trials: Sequence[Trial]) -> Arm:
    first = trials[0].record
    title = str(first["title"]).removesuffix(plan.arm_text(None, first["axes"])).strip()
    return Arm(text, title, first["step"], first["axes"], tuple(trials))
