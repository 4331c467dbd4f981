# SPDX-License-Identifier: MIT
"""Exact tests, the intervals they imply, and the words a contrast earns.

Both tests compare the observed mean difference with all regroupings of the same numbers: sign flips of
paired differences, permutations of two arms.  A regrouping is at least as large as what was observed exactly
when its typical value, the mean difference over what it exchanges, is at most the assumed effect (Hartigan
1969, https://doi.org/10.1080/01621459.1969.10501057); so the typical values give p and interval alike.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import NormalDist

import numpy as np

from ablab.plan import smallest_p

EXACT_PAIRS = 20
EXACT_ARM = 11
DRAWS = 1_000_000
POWER = 0.8


@dataclass(frozen=True, slots=True)
class Exact:
    """The regroupings of one comparison: `effect` is the observed mean difference, `values` the typical
    values of all regroupings but those, `same` of them, that change nothing."""

    effect: float
    values: np.ndarray
    same: int = 1

    @property
    def drawn(self) -> bool:
        """True where there were too many regroupings to look at all."""
        return len(self.values) + self.same == DRAWS + 1

    def greater(self, mu: float = 0.0) -> float:
        """One-sided p of the hypothesis that the true effect is at most `mu`."""
        return (self.same + int(np.sum(self.values <= mu + self._tie()))) / self._total()

    def less(self, mu: float = 0.0) -> float:
        """One-sided p of the hypothesis that the true effect is at least `mu`."""
        return (self.same + int(np.sum(self.values >= mu - self._tie()))) / self._total()

    def p(self, mu: float = 0.0) -> float:
        """Two-sided p of the hypothesis that the true effect is `mu`: twice the smaller one-sided p."""
        return min(1.0, 2 * min(self.greater(mu), self.less(mu)))

    def interval(self, alpha: float) -> tuple[float, float, float] | None:
        """Low, high and the level really reached: all effects that the two-sided test does not reject.

        With too few numbers for 1 - alpha it is the range of the typical values at its lower level; None for
        a single pair, whose level would be 0.
        """
        rejected = math.floor(alpha / 2 * self._total() + 1e-9)  # 1e-9: 0.05 / 2 * 40 may read 0.999..
        cut = max(1, rejected - self.same + 1)
        level = 1 - 2 * (cut - 1 + self.same) / self._total()
        if level <= 0:
            return None
        ends = np.partition(self.values, [cut - 1, len(self.values) - cut])
        return float(ends[cut - 1]), float(ends[-cut]), level

    def _total(self) -> int:
        return len(self.values) + self.same

    def _tie(self) -> float:
        # sums of equal numbers in another order differ in the last bits
        return 1e-12 * float(np.abs(self.values).max(initial=0.0))


def paired(differences: Sequence[float]) -> Exact:
    """Sign flips of the mean: all 2^n up to n = 20, then 10^6 draws from a fixed seed."""
    d = np.asarray(differences, float)
    if len(d) > EXACT_PAIRS:
        return _drawn(float(d.mean()), d, lambda u: u < 0.5, 1)
    sums, sizes = np.zeros(1), np.zeros(1, int)
    for value in d:
        sums, sizes = np.concatenate([sums, sums + value]), np.concatenate([sizes, sizes + 1])
    return Exact(float(d.mean()), sums[1:] / sizes[1:])


def unpaired(left: Sequence[float], right: Sequence[float]) -> Exact:
    """Permutations of two arms: all of them up to 11 an arm, then 10^6 draws from a fixed seed."""
    x, y = np.asarray(left, float), np.asarray(right, float)
    effect, n = float(x.mean() - y.mean()), len(x)
    if max(n, len(y)) > EXACT_ARM:
        left_arm = np.arange(n + len(y)) < n  # moved: those that leave it, and as many that enter
        moved = lambda u: (u <= np.partition(u, n - 1, axis=1)[:, n - 1 : n]) != left_arm
        return _drawn(effect, np.concatenate([x, -y]), moved, 2)
    sizes = range(1, min(n, len(y)) + 1)
    values = [np.subtract.outer(_means(x, k), _means(y, k)).ravel() for k in sizes]
    return Exact(effect, np.concatenate(values))


def _means(x: np.ndarray, size: int) -> np.ndarray:
    return x[np.array(list(combinations(range(len(x)), size)))].mean(1)


def _drawn(effect: float, numbers: np.ndarray, moved: Callable[[np.ndarray], np.ndarray], sides: int) -> Exact:
    """Regroupings by random numbers: `moved` marks the ones that change sign or arm, `sides` to a swap."""
    rng, parts = np.random.default_rng(0), []
    for _ in range(10):  # in parts, for the memory
        mask = moved(rng.random((DRAWS // 10, len(numbers))))
        size = mask.sum(1) / sides
        parts.append(mask[size > 0] @ numbers / size[size > 0])
    values = np.concatenate(parts)
    return Exact(effect, values, 1 + DRAWS - len(values))


def holm(ps: Sequence[float]) -> list[float]:
    """p values adjusted for the whole family (Holm 1979, https://www.jstor.org/stable/4615733)."""
    adjusted, floor = [1.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        floor = max(floor, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = floor
    return adjusted


def needed(alpha: float, family: int, is_paired: bool, sides: int = 2) -> int:
    """The fewest seeds at which every contrast of a family can be decided."""
    return next(n for n in range(1, 64) if smallest_p(n, is_paired, sides) * family <= alpha)


def seeds_for(effect: float, sd: float, alpha: float, is_paired: bool) -> int:
    """Seeds for 80 % power at this effect; normal quantiles with Guenther's correction for the unknown sd."""
    za, zb = NormalDist().inv_cdf(1 - alpha / 2), NormalDist().inv_cdf(POWER)
    scale = 1 if is_paired else 2
    return math.ceil(scale * ((za + zb) * sd / effect) ** 2 + za**2 / (2 * scale))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What was registered before the first trial."""

    better: str | None
    """lower, higher, or None where the metric has no direction."""
    alpha: float = 0.05
    sides: int = 2
    margin: float | None = None
    is_paired: bool = True
    failures: str = "block"
    looks: tuple[int, ...] = ()
    fixed: bool = False
    """No seed changes the metric, so a difference needs no test."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """Two arms: values by seed where there is one, and what became of the planned trials that have none."""

    left: str
    right: str
    title: str
    """What the left arm is."""
    where: str
    """The point of the axes that both arms share."""
    a: Mapping[int, float]
    b: Mapping[int, float]
    failed: tuple[tuple[str, int, str], ...]
    """Trials that ended without a value: `a` or `b`, seed, and `id (state)`."""
    waiting: int
    """Trials that have not ended."""
    hours: float | None
    """Mean cost of one trial of each arm together."""
    registered: bool = True

    @property
    def label(self) -> str:
        return f"{self.left} - {self.right}" + (f" at {self.where}" if self.where else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What is known about one contrast; `effect` is left minus right, None without a value in both arms."""

    contrast: Contrast
    n: int
    effect: float | None = None
    percent: float | None = None
    interval: tuple[float, float, float] | None = None
    p: float | None = None
    p_family: float | None = None
    correlation: float | None = None
    drawn: bool = False
    word: str = ""
    note: str = ""

    @property
    def is_open(self) -> bool:
        """True if it answers nothing (yet)."""
        return self.word.startswith(("undecided", "cannot decide", "exploratory"))

    @property
    def is_decided(self) -> bool:
        """True if the test found a difference, or that there is none beyond the margin."""
        return bool(self.word) and not self.is_open and self.word != "no difference"

    @property
    def is_different(self) -> bool:
        """True if the test found a difference: in a placebo, a false one."""
        return self.word.startswith(("better", "worse", "lower", "higher"))


def judge(contrasts: Sequence[Contrast], rule: Rule) -> list[Verdict]:
    """A verdict for each contrast.  The registered ones are one family; the others are exploratory."""
    tests = [_Test(c, rule) for c in contrasts]
    family = [t for t in tests if t.c.registered]
    better, equal = holm([t.p_counted for t in family]), holm([t.q_counted for t in family])
    for t, p, q in zip(family, better, equal, strict=True):
        t.p_family, t.q_family, t.family = p, q, len(family)
    return [t.verdict() for t in tests]


class _Test:
    """One contrast under the registered rule: p of a difference, q of one beyond the margin."""

    p_family: float | None = None
    q_family, family = 1.0, 1

    def __init__(self, c: Contrast, rule: Rule) -> None:
        self.c, self.rule = c, rule
        shared = c.a.keys() & c.b.keys()
        self.a, self.b = ([side[s] for s in sorted(shared if rule.is_paired else side)] for side in (c.a, c.b))
        self.n = min(len(self.a), len(self.b))
        self.alpha = rule.alpha / max(1, len(rule.looks))
        self.exact = self._exact(self.a, self.b) if self.n else None
        self.open = self._open()
        self.p = self._sided(self.exact) if self.exact else 1.0
        if self.exact and c.failed and rule.failures == "worst":
            self.p = self._signs()
        self.fixed = rule.fixed and self.n > 0 and not (np.ptp(self.a) or np.ptp(self.b)) and self.a != self.b
        self.p_counted = 1.0 if self.open or self.fixed else self.p
        m, equal = rule.margin, self.exact and not self.open and not c.failed
        self.q_counted = max(self.exact.greater(-m), self.exact.less(m)) if m and equal else 1.0

    def verdict(self) -> Verdict:
        c, exact = self.c, self.exact
        word, note = ("exploratory", self.open) if not c.registered else ("undecided", self.open)
        if exact is None:
            return Verdict(contrast=c, n=0, word=word, note=note)
        if c.registered and not self.open:
            word, note = self._word()
        base = abs(float(np.mean(self.b)))
        return Verdict(
            contrast=c,
            n=self.n,
            effect=exact.effect,
            percent=100 * exact.effect / base if base else None,
            # one-sided: the level at which interval and test agree
            interval=exact.interval(self.alpha * (3 - self.rule.sides)),
            p=None if self.fixed else self.p,
            p_family=None if self.fixed else self.p_family,
            correlation=self._correlation(),
            drawn=exact.drawn,
            word=word,
            note=note,
        )

    def _exact(self, a: Sequence[float], b: Sequence[float]) -> Exact:
        return paired(np.subtract(a, b)) if self.rule.is_paired else unpaired(a, b)

    def _sided(self, exact: Exact) -> float:
        if self.rule.sides == 2 or self.rule.better is None:
            return exact.p()
        return exact.less() if self.rule.better == "lower" else exact.greater()

    def _signs(self) -> float:
        """Sign test in which a failed trial loses its pair; two failures and equal values decide nothing."""
        c, sign = self.c, -1 if self.rule.better == "lower" else 1
        lost_a, lost_b = ({seed for s, seed, _ in c.failed if s == side} for side in "ab")
        gains = [sign * (c.a[s] - c.b[s]) for s in c.a.keys() & c.b.keys()]
        wins = sum(g > 0 for g in gains) + len(lost_b - lost_a)
        losses = sum(g < 0 for g in gains) + len(lost_a - lost_b)
        n, most = wins + losses, wins if self.rule.sides == 1 else max(wins, losses)
        return min(1.0, self.rule.sides * sum(math.comb(n, k) for k in range(most, n + 1)) / 2**n)

    def _open(self) -> str:
        """Why there can be no verdict yet, empty if there can."""
        c, looks = self.c, self.rule.looks
        if c.failed and not (self.rule.failures == "worst" and self.rule.is_paired):
            return "blocked by " + ", ".join(what for _, _, what in c.failed)
        if c.waiting:
            return f"unfinished, {c.waiting} trials to go"
        if not self.n or (looks and self.n not in looks):
            return f"n={self.n}, registered looks {', '.join(map(str, looks))}" if looks else "no values"
        return ""

    def _correlation(self) -> float | None:
        if not self.rule.is_paired or self.n < 3 or 0 in (np.ptp(self.a), np.ptp(self.b)):
            return None
        return float(np.corrcoef(self.a, self.b)[0, 1])

    def _word(self) -> tuple[str, str]:
        rule, n = self.rule, self.n
        if self.a == self.b:
            return "no difference", "equal values in both arms"
        if self.fixed:
            return self._direction(), "no seed changes it, so no test"
        sides = [rule.sides] + ([1] if rule.margin else [])
        planned = n + len({seed for _, seed, _ in self.c.failed})
        if all(smallest_p(planned, rule.is_paired, s) * self.family > self.alpha for s in sides):
            need = needed(self.alpha, self.family, rule.is_paired, rule.sides)
            return f"cannot decide at n={n}", f"needs {need} {'pairs' if rule.is_paired else 'seeds an arm'}"
        decided, equal = self.p_family <= self.alpha, self.q_family <= self.alpha
        if not decided:
            return (f"equivalent within {rule.margin:g}", "") if equal else ("undecided", self._more())
        word = self._direction() + (", negligible" if equal else "")
        return word + (", fragile" if any(map(self._leans_on, range(n))) else ""), ""

    def _direction(self) -> str:
        names = ("better", "worse") if self.rule.better else ("lower", "higher")
        return names[(self.exact.effect > 0) != (self.rule.better == "higher")]

    def _leans_on(self, i: int) -> bool:
        """Whether one seed decides: without it the sign turns, or a test that still can decide does not."""
        a, b = self.a[:i] + self.a[i + 1 :], self.b[:i] + self.b[i + 1 :]
        if (np.mean(a) - np.mean(b)) * self.exact.effect <= 0:
            return True
        alpha, rule = self.alpha / self.family, self.rule
        able = not self.exact.drawn and smallest_p(self.n - 1, rule.is_paired, rule.sides) <= alpha
        return able and self._sided(self._exact(a, b)) > alpha

    def _more(self) -> str:
        """How many more seeds would probably decide, if the effect seen is real or lies inside the margin."""
        if self.n < 3:
            return "too few seeds to say how many more"
        a, b, rule, effect = self.a, self.b, self.rule, abs(self.exact.effect)
        parts = [np.subtract(a, b)] if rule.is_paired else [a, b]
        sd = math.sqrt(np.mean([np.var(part, ddof=1) for part in parts]))
        goals = [g for g in (effect, (rule.margin or 0) - effect) if g > 0]
        least, alpha = needed(self.alpha, self.family, rule.is_paired, rule.sides), self.alpha / self.family
        wanted = [max(least, seeds_for(g, sd, alpha, rule.is_paired)) for g in goals]
        more = max(1, min(wanted, default=10**9) - self.n)
        if more > 1000:
            return "more than 1000 more seeds"
        cost = f", {more * self.c.hours:.2g} trial hours" if self.c.hours else ""
        return f"about {more} more seeds{cost}"
