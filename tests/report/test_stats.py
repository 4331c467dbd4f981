# SPDX-License-Identifier: MIT
"""Tests and intervals against brute force, the table of what n can show, and every verdict word."""

from fractions import Fraction
from itertools import combinations, product
from math import erf, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ablab.report import stats
from ablab.report.stats import Contrast, Rule, judge

NUMBERS = st.integers(-50, 50)
quick = settings(max_examples=40, deadline=None, derandomize=True)


def flip_p(d, mu=0):
    """Two-sided sign-flip p by looking at every flip, in exact arithmetic."""
    d = [Fraction(x) - Fraction(mu) for x in d]
    seen = [abs(sum(s * x for s, x in zip(signs, d, strict=True))) for signs in product((1, -1), repeat=len(d))]
    return Fraction(sum(s >= abs(sum(d)) for s in seen), len(seen))


def swap_p(x, y, mu=0):
    """Two-sided permutation p, twice the smaller tail, by looking at every split, in exact arithmetic."""
    pool = [Fraction(v) - Fraction(mu) for v in x] + [Fraction(v) for v in y]
    sums = [sum(c) for c in combinations(pool, len(x))]
    mine = sum(pool[: len(x)])
    tails = sum(s >= mine for s in sums), sum(s <= mine for s in sums)
    return min(Fraction(1), Fraction(2 * min(tails), len(sums)))


def contrast(a, b, *, failed=(), waiting=0, hours=None, registered=True):
    numbered = [dict(enumerate(v)) if not isinstance(v, dict) else v for v in (a, b)]
    facts = {"left": "R1", "right": "R0", "title": "", "where": "", "hours": hours}
    return Contrast(a=numbered[0], b=numbered[1], failed=failed, waiting=waiting, registered=registered, **facts)


def verdict(a, b, rule=None, **facts):
    return judge([contrast(a, b, **facts)], rule or Rule(better="lower"))[0]


def shifted(effect, n=8, noise=0.01):
    """Two arms that differ by `effect`, give or take a noise that is not constant."""
    base = [2 + 0.1 * i for i in range(n)]
    return [v + effect + noise * ((i * 5) % 7 - 3) / 3 for i, v in enumerate(base)], base


@quick
@given(st.lists(NUMBERS, min_size=1, max_size=8), st.integers(-30, 30))
def test_paired_p_equals_all_sign_flips(d, mu):
    assert stats.paired(d).p(mu) == pytest.approx(float(flip_p(d, mu)), abs=1e-12)


@quick
@given(st.lists(NUMBERS, min_size=1, max_size=5), st.lists(NUMBERS, min_size=1, max_size=5), st.integers(-30, 30))
def test_unpaired_p_equals_all_permutations(x, y, mu):
    assert stats.unpaired(x, y).p(mu) == pytest.approx(float(swap_p(x, y, mu)), abs=1e-12)


@quick
@given(st.lists(st.integers(-900, 900), min_size=6, max_size=9, unique=True), st.sampled_from([0.05, 0.1, 0.2]))
def test_interval_holds_exactly_the_effects_that_are_not_rejected(d, alpha):
    low, high, level = stats.paired(d).interval(alpha)
    assert level >= 1 - alpha
    width = Fraction(1, 10**6)
    for end, outward in ((low, -1), (high, 1)):
        end = Fraction(end).limit_denominator(1000)  # a mean of at most 9 integers
        assert flip_p(d, end) > alpha
        assert flip_p(d, end + outward * width) <= alpha


def test_unpaired_interval_ends_where_the_test_rejects():
    x, y = [1, 4, 9, 16], [0, 2, 3, 11]
    low, high, level = stats.unpaired(x, y).interval(0.1)
    assert level == pytest.approx(1 - 2 * 3 / 70)
    assert swap_p(x, y, low) > 0.1 and swap_p(x, y, high) > 0.1
    assert swap_p(x, y, low - 1e-6) <= 0.1 and swap_p(x, y, high + 1e-6) <= 0.1


@pytest.mark.parametrize(
    ("n", "p", "level"), [(3, 0.25, 0.75), (4, 0.125, 0.875), (5, 0.0625, 0.9375), (6, 0.03125, 0.96875)]
)
def test_few_pairs_give_the_range_at_the_level_that_n_allows(n, p, level):
    d = [1.0 + i for i in range(n)]
    exact = stats.paired(d)
    assert exact.p() == p
    assert exact.interval(0.05) == (1.0, float(n), pytest.approx(level))


def test_one_pair_has_no_interval():
    assert stats.paired([0.3]).interval(0.05) is None


def test_level_reaches_95_percent_by_inversion_from_8_pairs():
    assert stats.paired([float(i) for i in range(8)]).interval(0.05)[2] == pytest.approx(1 - 12 / 256)


def test_drawn_flips_come_near_the_normal_law_and_never_change():
    d = list(np.random.default_rng(3).normal(0.35, 1, 40))
    exact = stats.paired(d)
    z = sum(d) / sqrt(sum(x * x for x in d))
    assert exact.drawn and exact.p() == stats.paired(d).p()
    assert exact.p() == pytest.approx(2 * (1 - (1 + erf(z / sqrt(2))) / 2), rel=0.1)


def test_drawn_permutations_agree_with_all_of_them(monkeypatch):
    x, y = [3.0, 5.5, 4.1, 6.2, 5.0, 4.4], [3.9, 2.0, 3.5, 4.2, 3.0, 2.8]
    full = stats.unpaired(x, y)
    monkeypatch.setattr(stats, "EXACT_ARM", 5)
    drawn = stats.unpaired(x, y)
    assert drawn.drawn and not full.drawn
    assert drawn.p() == pytest.approx(full.p(), rel=0.05)
    assert drawn.interval(0.05)[:2] == pytest.approx(full.interval(0.05)[:2], abs=0.05)


def test_holm_matches_a_worked_example():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]


def test_pairs_needed_for_families():
    assert [stats.needed(0.05, k, True) for k in (1, 3, 5, 10, 18)] == [6, 7, 8, 9, 10]


def test_seeds_for_80_percent_power_follow_the_published_table():
    assert [stats.seeds_for(effect, 1.0, 0.05, True) for effect in (1.2, 1.0)] == [8, 10]


@pytest.mark.parametrize(
    ("better", "effect", "word"),
    [("lower", -0.5, "better"), ("lower", 0.5, "worse"), ("higher", 0.5, "better"), ("higher", -0.5, "worse")]
    + [(None, 0.5, "higher"), (None, -0.5, "lower")],
)
def test_word_follows_the_direction_of_the_metric(better, effect, word):
    v = verdict(*shifted(effect), Rule(better=better))
    assert v.word == word and v.effect == pytest.approx(effect, abs=0.01) and v.p == 2 / 2**8


def test_effect_is_left_minus_right_in_percent_of_right():
    v = verdict([1.8] * 4, [2.0] * 4)
    assert (v.effect, v.percent) == (pytest.approx(-0.2), pytest.approx(-10))


def test_equivalent_needs_both_one_sided_tests():
    rule = Rule(better="lower", margin=0.05)
    a, b = shifted(0.0, noise=0.03)
    assert verdict(a, b, rule).word == "equivalent within 0.05"
    assert verdict(a, b, Rule(better="lower", margin=0.005)).word == "undecided"


def test_a_small_sure_gain_is_better_but_negligible():
    assert verdict(*shifted(-0.02, noise=0.001), Rule(better="lower", margin=0.05)).word == "better, negligible"


def test_three_pairs_cannot_decide_and_the_note_says_what_can():
    v = verdict(*shifted(-0.5, n=3))
    assert (v.word, v.note) == ("cannot decide at n=3", "needs 6 pairs")


def test_equivalence_is_possible_from_five_pairs():
    assert verdict(*shifted(0.0, n=5, noise=0.001), Rule(better="lower", margin=0.05)).word == "equivalent within 0.05"


def test_undecided_says_how_many_more_seeds_and_what_they_cost():
    a, b = shifted(-0.02, noise=0.06)
    v = verdict(a, b, hours=0.5)
    more = int(v.note.split()[1])
    sd = np.std(np.subtract(a, b), ddof=1)
    assert v.word == "undecided" and v.note == f"about {more} more seeds, {more / 2:.2g} trial hours"
    assert 8 + more == pytest.approx((1.96 + 0.84) ** 2 * (sd / v.effect) ** 2 + 2, abs=1.5)


def test_a_failed_pair_blocks_whatever_the_others_show():
    a, b = shifted(-0.5)
    v = verdict({s: v for s, v in enumerate(a) if s}, b, failed=(("a", 0, "r1-s0 (diverged)"),))
    assert (v.word, v.note, v.p_family, v.n) == ("undecided", "blocked by r1-s0 (diverged)", 1.0, 7)


def test_worst_counts_a_failed_trial_as_a_loss():
    a, b = shifted(-0.5, n=10)
    rule = Rule(better="lower", failures="worst")
    left = verdict({s: v for s, v in enumerate(a) if s}, b, rule, failed=(("a", 0, "x"),))
    right = verdict(a, {s: v for s, v in enumerate(b) if s}, rule, failed=(("b", 0, "x"),))
    assert left.p == pytest.approx(2 * (1 + 10) / 2**10) and right.p == pytest.approx(2 / 2**10)


def test_unfinished_contrasts_count_as_p_1_in_the_family():
    done, open_ = contrast(*shifted(-0.5)), contrast(*shifted(-0.5), waiting=2)
    first, second = judge([done, open_], Rule(better="lower"))
    assert first.p_family == pytest.approx(2 * 2 / 2**8) and first.word == "better"
    assert second.p_family == 1.0 and second.note == "unfinished, 2 trials to go"


def test_exploratory_contrasts_get_no_verdict_and_do_not_change_the_family():
    registered = contrast(*shifted(-0.5))
    alone = judge([registered], Rule(better="lower"))[0]
    both = judge([registered, contrast(*shifted(-0.9), registered=False)], Rule(better="lower"))
    assert both[0] == alone
    assert both[1].word == "exploratory" and both[1].p_family is None and both[1].effect is not None


def test_looks_split_alpha_and_other_n_are_not_judged():
    a, b = shifted(-0.5)
    assert verdict(a, b, Rule(better="lower", looks=(6, 8))).word == "better"
    assert verdict(a, b, Rule(better="lower", looks=(6, 12))).word == "undecided"
    p = 2 / 2**8
    assert verdict(a, b, Rule(better="lower", looks=(8,), alpha=p)).word == "better"
    assert verdict(a, b, Rule(better="lower", looks=(8, 9), alpha=p)).word == "cannot decide at n=8"


def test_identical_arms_read_no_difference():
    assert verdict([2.0, 2.1, 2.2] * 3, [2.0, 2.1, 2.2] * 3).word == "no difference"


def test_one_seed_that_carries_the_sign_makes_a_verdict_fragile():
    b = [2.0] * 10
    a = [2.0 - d for d in (0.02, 0.02, 0.02, 0.02, 0.02, 0.02, 0.02, 0.02, 0.02, -0.01)]
    assert "fragile" not in verdict(a, b).word
    a = [2.0 - d for d in (0.08, 0.02, 0.02, 0.02, 0.02, 0.01, 0.01, -0.01, 0.01, -0.03)]
    v = verdict(a, b, Rule(better="lower", alpha=stats.paired([x - 2 for x in a]).p()))
    assert v.word == "better, fragile"


def test_one_sided_test_and_interval_agree():
    v = verdict(*shifted(-0.5, n=5), Rule(better="lower", sides=1))
    assert v.word == "better" and v.p == 1 / 2**5
    assert v.interval[2] == pytest.approx(1 - 2 / 2**5)
    assert verdict(*shifted(0.5, n=5), Rule(better="lower", sides=1)).word == "undecided"


def test_correlation_of_pairs_is_reported():
    v = verdict([1.0, 2.0, 3.0, 4.5], [2.0, 4.0, 6.0, 9.0])
    assert v.correlation == pytest.approx(1.0)
    assert verdict([1.0, 2.0, 4.0], [3.0, 3.0, 3.0]).correlation is None


@pytest.mark.parametrize("is_paired", [True, False])
def test_false_verdicts_of_identical_arms_stay_below_alpha(is_paired):
    rng, wrong = np.random.default_rng(7), 0
    rule = Rule(better="lower", is_paired=is_paired)
    n, campaigns = (8, 2000) if is_paired else (5, 1000)
    for _ in range(campaigns):
        arms = rng.normal(2, 0.1, (3, n))
        verdicts = judge([contrast(arms[i], arms[0]) for i in (1, 2)], rule)
        wrong += any(v.word.startswith(("better", "worse")) for v in verdicts)
    assert wrong / campaigns <= 0.05 + 0.01
