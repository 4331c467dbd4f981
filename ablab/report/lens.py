# SPDX-License-Identifier: MIT
"""The same trials at equal time, tokens, FLOPs and memory: what another budget than the registered one would show."""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from ablab.report.load import Loaded, Trial

AXES = {"train_s": "s", "tokens": "tokens", "flops": "FLOP"}
SLACK = 0.01
"""Budgets that differ by less count as equal."""


@dataclass(frozen=True, slots=True)
class Point:
    """One arm under a lens: the metric's mean over the seeds at the lens' value, None where the arm has none."""

    value: float | None
    rank: int | None
    """1 is best; of the arms that have a value."""
    registered: int | None
    """Its rank under the registered budget."""
    used: float
    """What a trial of the arm used up to its end, mean over the seeds."""
    n: int
    mid_schedule: bool
    """The learning rate had not come down yet: more of this budget would help by more than its length."""


@dataclass(frozen=True, slots=True)
class Lens:
    """All arms at `at`, the largest amount of a budget that every trial reached; nothing is extrapolated."""

    name: str
    """`train_s`, `tokens`, `flops` or `memory`."""
    unit: str
    at: float
    arms: Mapping[str, Point]
    """By the text of the arm."""
    flips: tuple[tuple[str, str], ...]
    """Compared pairs (left, right) whose order is not that of the registered budget."""


def lenses(c: Loaded) -> tuple[Lens, ...]:
    """A lens for each budget that every done trial measured; empty with fewer than two arms that have a result.

    Between two evaluations a value is interpolated.  Peak memory is one number for a trial, so under that lens an
    arm that needs more than the least needy one, and 1 %, has no value.
    """
    has = lambda t: t.value(c.key, c.mode) is not None and t.points(c.key)
    arms = {a.text: trials for a in c.arms.values() if (trials := [t for t in a.trials if has(t)])}
    if len(arms) < 2:
        return ()
    final = {text: fmean(t.value(c.key, c.mode) for t in trials) for text, trials in arms.items()}
    found = []
    for axis, unit in AXES.items():
        ends = {text: [t.points(c.key, axis)[-1][0] for t in trials] for text, trials in arms.items()}
        at = min(map(min, ends.values()))
        if at > 0:
            read = {text: fmean(_at(t.points(c.key, axis), at, c.mode) for t in arms[text]) for text in arms}
            late = {
                text: any(_is_early(t, at / e) for t, e in zip(arms[text], ends[text], strict=True)) for text in arms
            }
            found.append(_lens(c, axis, unit, at, read, {k: fmean(v) for k, v in ends.items()}, late, arms, final))
    peaks = {text: fmean(t.summary["perf"]["peak_mem_bytes"] for t in trials) for text, trials in arms.items()}
    at = min(peaks.values())
    read = {text: final[text] if peaks[text] <= at * (1 + SLACK) else None for text in arms}
    return (*found, _lens(c, "memory", "bytes", at, read, peaks, {}, arms, final))


def _lens(
    c: Loaded,
    name: str,
    unit: str,
    at: float,
    read: Mapping[str, float | None],
    used: Mapping[str, float],
    late: Mapping[str, bool],
    arms: Mapping[str, Sequence[Trial]],
    final: Mapping[str, float],
) -> Lens:
    sign = -1 if c.metric.better == "higher" else 1
    ranks, registered = (_ranks(values, sign) for values in (read, final))
    points = {
        text: Point(
            read[text], ranks.get(text), registered.get(text), used[text], len(arms[text]), late.get(text, False)
        )
        for text in arms
    }
    pairs = [(a.text, b.text) for a, b, _ in c.pairs() if a.text in arms and b.text in arms]
    flips = tuple(
        (a, b) for a, b in pairs if None not in (read[a], read[b]) and (read[a] - read[b]) * (final[a] - final[b]) < 0
    )
    return Lens(name, unit, at, points, flips)


def _ranks(values: Mapping[str, float | None], sign: int) -> dict[str, int]:
    order = sorted(sign * v for v in values.values() if v is not None)
    return {text: 1 + bisect_left(order, sign * v) for text, v in values.items() if v is not None}


def _at(points: Sequence[tuple[float, float]], at: float, mode: str) -> float:
    """The metric at `at`, or its least or largest value up to there."""
    before = [p for p in points if p[0] <= at]
    (x, y), after = before[-1], next((p for p in points if p[0] > at), None)
    value = y if after is None else y + (after[1] - y) * (at - x) / (after[0] - x)
    pick: Callable[..., float] = {"final": lambda *v: v[-1], "min": min, "max": max}[mode]
    return pick(*(v for _, v in before), value)


def _is_early(t: Trial, share: float) -> bool:
    """Whether the rate was above its last value at this share of the trial; so too where no rate is on record.  A
    trial that was stopped early is in mid-schedule as soon as its rate has begun to fall."""
    known = [(progress, rate) for _, progress, rate in t.summary.get("rates") or ()]
    if not known:
        return share < 1 - SLACK
    end, last = known[-1]
    if share >= 1 - SLACK:
        return end < 1 - SLACK and last < max(rate for _, rate in known)
    (x, y), (u, v) = next(pair for pair in pairwise(known) if share * end < pair[1][0])
    return y + (v - y) * max(0.0, share * end - x) / (u - x) > last * (1 + 1e-9)
