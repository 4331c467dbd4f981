# SPDX-License-Identifier: MIT
"""Before and beside the verdicts: how many seeds a campaign needs, where its noise comes from, how often A/A fails."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import stdev

from ablab import rundir
from ablab.plan import smallest_p
from ablab.report import load, page, stats
from ablab.report.load import Loaded
from ablab.report.table import Cell, Table, merge

LEAST_PAIRS = 3
BOUND = 0.8
"""Share of pilots whose bound of the standard deviation holds; after few pairs the estimate alone is far too low."""


class PilotError(ValueError):
    """A campaign is too small to plan from."""


def sd_bound(sd: float, n: int, level: float = BOUND) -> float:
    """Upper bound of a standard deviation that was estimated from n normal values."""
    dof = n - 1
    return sd * math.sqrt(dof / _solve(lambda x: _chi2(x, dof), 1 - level, 0.0, 50.0 + 10 * dof))


def rate_interval(false: int, n: int, alpha: float = 0.05) -> tuple[float, float]:
    """Bounds of a rate, each missed with probability alpha (Clopper and Pearson 1934,
    https://doi.org/10.1093/biomet/26.4.404)."""
    above = lambda p, k: sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))
    low = 0.0 if not false else _solve(lambda p: above(p, false), alpha, 0.0, 1.0)
    high = 1.0 if false == n else _solve(lambda p: above(p, false + 1), 1 - alpha, 0.0, 1.0)
    return low, high


def _chi2(x: float, dof: int) -> float:
    """P(chi-square <= x): the series of the lower incomplete gamma function."""
    a, half = dof / 2, x / 2
    term = total = 1 / a
    while half > 0 and abs(term) > 1e-15 * total:
        a += 1
        term *= half / a
        total += term
    return total * math.exp(-half + dof / 2 * math.log(half) - math.lgamma(dof / 2)) if half > 0 else 0.0


def _solve(rising: Callable[[float], float], value: float, low: float, high: float) -> float:
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < value else (low, middle)
    return (low + high) / 2


def plan(c: Loaded, effect: float | None = None) -> Table:
    """Seeds, hours and cost with which each contrast would be decided at 80 % power, from the trials there are.

    `effect` is the difference to be seen; by default the registered margin, else what was observed, which is itself
    uncertain.  Raises PilotError with fewer than three pairs everywhere.
    """
    r, rows = c.registered, []
    alpha = r["alpha"] / max(1, len(r["looks"]))
    family = max(1, sum(registered for _, _, registered in c.pairs()))
    price = next((float(p.strip('"')) for t in c.trials[:1] if (p := t.values.get("SYS_PRICE_PER_HOUR"))), 0.0)
    for v in page.judge(c):
        con = v.contrast
        seeds = sorted(con.a.keys() & con.b.keys()) if r["paired"] else None
        parts = [[con.a[s] - con.b[s] for s in seeds]] if seeds is not None else [[*con.a.values()], [*con.b.values()]]
        n = min(map(len, parts))
        if n < LEAST_PAIRS or v.effect is None:
            continue
        sd = math.sqrt(sum(stdev(part) ** 2 for part in parts) / len(parts))
        bound = sd_bound(sd, sum(map(len, parts)) - len(parts) + 1)
        sought, basis = (
            (effect, "asked") if effect else (r["margin"], "margin") if r["margin"] else (abs(v.effect), "observed")
        )
        least = stats.needed(alpha, family, r["paired"], r["sides"])
        need = max(least, stats.seeds_for(sought, bound, alpha / family, r["paired"])) if sought else None
        more = None if need is None else max(0, need - n) if con.registered else need  # a pilot's seeds are no evidence
        hours = None if more is None or con.hours is None else more * con.hours
        cost = hours * price if hours is not None and price else None
        rows.append((con.label, n, sd, bound, sought, basis, need, more, hours, cost))
    if not rows:
        raise PilotError(
            f"{c.name}: no contrast has {LEAST_PAIRS} seeds in both arms; run a pilot of {LEAST_PAIRS} or more"
        )
    columns = (
        "contrast",
        "n",
        "sd",
        f"sd {BOUND:.0%} bound",
        "effect",
        "basis",
        "seeds",
        "more",
        "trial hours",
        "cost",
    )
    return merge(columns, rows, {"sd": ".3g", columns[3]: ".3g", "effect": ".3g", "trial hours": ".2g", "cost": ".2f"})


def placebo(results: Path) -> tuple[Table, str]:
    """Every A/A comparison of all campaigns that its seeds could decide, and how many found a difference."""
    rows: list[tuple[Cell, ...]] = []
    able: list[bool] = []
    for campaign in rundir.campaigns(results):
        c = load.read(campaign)
        alpha, sides = c.registered["alpha"], c.registered["sides"]
        for v in page.placebos(c):
            whole = v.n and not v.contrast.failed and not v.contrast.waiting
            if whole and smallest_p(v.n, False, sides) <= alpha:
                able.append(v.is_different)
            rows.append((c.name, v.contrast.label, v.n, v.effect, v.p, v.word, v.is_different))
    table = merge(("campaign", "placebo", "n", "difference", "p", "verdict", "false"), rows, {"p": ".3g"})
    if not able:
        return table, "no placebo comparison could be decided; a study has some with `placebo 1` and 4 seeds or more"
    low, high = rate_interval(sum(able), len(able))
    text = f"{sum(able)} false of {len(able)} that could be decided: {sum(able) / len(able):.1%}"
    return table, f"{text}, 90 % interval {low:.1%} to {high:.1%}"


def siblings(c: Loaded) -> list[Loaded]:
    """Other campaigns beside it that ran one of its trials again."""
    mine = {r["hash"] for r in c.dir.records().values()}
    beside = (other for other in rundir.campaigns(c.dir.path.parent) if other.path != c.dir.path)
    return [load.read(other) for other in beside if mine & {r["hash"] for r in other.records().values()}]


def noise(c: Loaded, others: Sequence[Loaded] = ()) -> Table:
    """Standard deviation of the metric by source: seeds, the same trial run again in `others`, evaluation batches.

    A source without data is left out; in runs of today evaluation batches leave none.
    """
    rows: list[tuple[Cell, ...]] = []
    arms = [[*arm.by_seed(c.key, c.mode).values()] for arm in c.arms.values()]
    rows += _pooled("seeds", arms)
    again: dict[str, list[float]] = {}
    for t in (t for each in (c, *others) for t in each.trials):
        if (value := t.value(c.key, c.mode)) is not None:
            again.setdefault(t.record["hash"], []).append(value)
    return merge(("source", "sd", "from"), rows + _pooled("same seed again", [*again.values()]), {"sd": ".3g"})


def _pooled(source: str, groups: Sequence[Sequence[float]]) -> list[tuple[Cell, ...]]:
    parts = [g for g in groups if len(g) > 1]
    dof = sum(len(g) - 1 for g in parts)
    if not dof:
        return []
    sd = math.sqrt(sum((len(g) - 1) * stdev(g) ** 2 for g in parts) / dof)
    return [(source, sd, f"{sum(map(len, parts))} trials in {len(parts)} groups")]
