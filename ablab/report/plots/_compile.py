# SPDX-License-Identifier: MIT
"""Trials that differ in compilation only, for the figures of torch.compile."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ablab import kconf, plan
from ablab.report import gpu
from ablab.report.load import Arm, Loaded, Trial
from ablab.report.plots import NotComparableError

SYMBOL = "SYS_COMPILE"
MEASURES: dict[str, tuple[str, str | None, Callable[[Trial], float | None]]] = {
    "gpu/memory_util_avg": ("memory activity (% of time)", None, lambda t: gpu.mean(t, "memory_util_avg")),
    "gpu/compute_util_avg": ("busy (% of time a kernel runs)", None, lambda t: gpu.mean(t, "compute_util_avg")),
    "train/tok_per_sec": ("tokens/s", "higher", lambda t: t.summary["perf"]["tok_per_s"]),
    "step_ms_p50": ("median step (ms)", "lower", lambda t: t.summary["perf"]["step_ms_p50"]),
    "peak_gib": ("peak memory (GiB)", "lower", lambda t: t.summary["perf"]["peak_mem_bytes"] / 2**30),
}
"""Name -> words with unit, which direction is better, value of a done trial.  Utilization has no better direction."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two arms of one treatment."""

    label: str
    off: Arm
    on: Arm


def status(arm: Arm) -> str | None:
    """`off` or `on` as the done trials recorded it, `mixed`, or None without one."""
    found = {str(m["resolved"]["compile"]) != "off" for t in arm.trials if t.is_done and (m := t.dir.manifest())}
    return None if not found else "mixed" if len(found) > 1 else "on" if found == {True} else "off"


def pairs(c: Loaded) -> list[Pair]:
    """Arms that were run with and without compilation and are equal otherwise.

    Raises NotComparableError with what differs if there is none.
    """
    rest = {text: _rest(arm) for text, arm in c.arms.items()}
    sides = {kind: [a for a in c.arms.values() if status(a) == kind] for kind in ("off", "on")}
    found = [
        Pair(_label(off), off, on) for off in sides["off"] for on in sides["on"] if rest[off.text] == rest[on.text]
    ]
    if found:
        return found
    if not all(sides.values()):
        have = ", ".join(f"{a.label} {status(a) or 'not done'}" for a in c.arms.values())
        raise NotComparableError(f"{c.name}: needs done trials with and without compilation; compile status: {have}")
    near = min(((a, b) for a in sides["off"] for b in sides["on"]), key=lambda p: len(_differ(rest, *p)))
    names = ", ".join(_differ(rest, *near))
    raise NotComparableError(
        f"{c.name}: {near[0].label} and {near[1].label} differ in more than {SYMBOL}: {names}; "
        f"make them equal, or run SWEEP='{SYMBOL}=OFF,ON'"
    )


def _rest(arm: Arm) -> Mapping[str, str]:
    values = arm.trials[0].values
    ignored = (*kconf.DECORATION, "")
    return {
        n: v
        for n, v in values.items()
        if n != plan.SEED and not n.startswith(SYMBOL) and n.partition("_")[0] not in ignored
    }


def _differ(rest: Mapping[str, Mapping[str, str]], a: Arm, b: Arm) -> list[str]:
    x, y = rest[a.text], rest[b.text]
    return [n for n in dict.fromkeys([*x, *y]) if x.get(n) != y.get(n)]


def _label(arm: Arm) -> str:
    axes = {k: v for k, v in arm.axes.items() if not k.startswith(SYMBOL)}
    return f"{plan.arm_text(arm.step, axes)} {arm.title}".strip() or "base"


def values(arm: Arm, name: str) -> dict[int, float]:
    """Seed -> measure of the done trials that have it."""
    found = {t.seed: MEASURES[name][2](t) for t in arm.trials if t.summary}
    return {seed: value for seed, value in found.items() if value is not None}
