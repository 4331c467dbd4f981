# SPDX-License-Identifier: MIT
"""How many seeds are needed, how often A/A comparisons fail, and where noise comes from."""

import math
from functools import partial

import numpy as np
import pytest

from ablab import __main__ as cli
from ablab.report import load, power, stats
from ablab.report.power import PilotError, rate_interval, sd_bound
from ablab.report.stats import Contrast, Rule
from tests.report import campaign

ARMS = (("R0", {}), ("R1", {}))
AA = {"arms": (("R0", {}), ("placebo1", {})), "contrasts": (), "placebo": 1}
SEEDS = {"R0": (1, 2, 3, 4), "placebo1": (5, 6, 7, 8)}
pair = partial(campaign.write, arms=ARMS, contrasts=[("R1", "R0")])


def test_the_bound_of_a_standard_deviation_matches_the_chi_square_table():
    # upper tail points of chi-square, from printed tables: P(chi2_dof <= x) = 0.05
    for dof, x in ((1, 0.0039321), (2, 0.102587), (5, 1.145476), (10, 3.940299), (29, 17.708366)):
        assert sd_bound(1.0, dof + 1, 0.95) == pytest.approx(math.sqrt(dof / x), rel=2e-3)
    assert 15 < sd_bound(1.0, 2, 0.95) < 17  # after two pairs it may be sixteen times the estimate


def test_none_false_of_ten_still_allows_a_quarter():
    assert rate_interval(0, 10) == (0.0, pytest.approx(1 - 0.05**0.1))
    low, high = rate_interval(2, 40)
    above = lambda p, k: sum(math.comb(40, i) * p**i * (1 - p) ** (40 - i) for i in range(k, 41))
    assert above(low, 2) == pytest.approx(0.05) and 1 - above(high, 3) == pytest.approx(0.05)
    assert rate_interval(10, 10)[1] == 1.0


@pytest.mark.parametrize(("n", "contrasts", "margin"), [(6, 1, None), (8, 3, None), (8, 2, 0.5)])
def test_false_verdicts_of_2000_campaigns_of_equal_arms_stay_at_alpha(n, contrasts, margin):
    rng, rule = np.random.default_rng(n), Rule(better="lower", margin=margin)
    fixed = {"title": "", "where": "", "failed": (), "waiting": 0, "hours": None}
    false = 0
    for _ in range(2000):
        shared = rng.normal(size=n)  # what a seed does to both arms
        arms = [dict(enumerate(shared + rng.normal(size=n))) for _ in range(contrasts + 1)]
        found = [Contrast(left=f"R{i}", right="R0", a=arms[i], b=arms[0], **fixed) for i in range(1, contrasts + 1)]
        false += any(v.is_different for v in stats.judge(found, rule))
    assert false / 2000 <= 0.05 + 0.01


def test_a_real_difference_is_found_by_the_same_machinery():
    fixed = {"title": "", "where": "", "failed": (), "waiting": 0, "hours": None}
    rng, found = np.random.default_rng(1), 0
    for _ in range(100):
        b = rng.normal(size=8)
        a, base = (dict(enumerate(v)) for v in (b - 3 + 0.3 * rng.normal(size=8), b))
        found += stats.judge([Contrast(left="R1", right="R0", a=a, b=base, **fixed)], Rule(better="lower"))[
            0
        ].is_different
    assert found > 95


# the planner


def noisy(arm, seed):
    return 2.0 + 0.1 * seed + (0.0 if arm[0] == "R0" else -0.02 + 0.01 * ((seed * 5) % 7 - 3))


def test_the_planner_asks_for_the_seeds_that_give_80_percent_power(tmp_path):
    c = load.read(pair(tmp_path, noisy, seeds=(1, 2, 3, 4), margin=0.05))
    (row,) = power.plan(c).rows
    cells = dict(zip(power.plan(c).columns, row, strict=True))
    d = [noisy(("R1", {}), s) - noisy(("R0", {}), s) for s in (1, 2, 3, 4)]
    assert cells["sd"] == pytest.approx(np.std(d, ddof=1)) and (cells["effect"], cells["basis"]) == (0.05, "margin")
    assert cells["sd 80% bound"] == pytest.approx(sd_bound(cells["sd"], 4))
    assert cells["more"] == cells["seeds"] - 4
    # by simulation with the bound as the truth: enough, and not by far too many
    rng = np.random.default_rng(0)
    share = lambda n: np.mean(
        [stats.paired(rng.normal(0.05, cells["sd 80% bound"], n)).p() <= 0.05 for _ in range(300)]
    )
    assert share(cells["seeds"]) > 0.75 and share(max(6, cells["seeds"] - 6)) < 0.85
    (asked,) = power.plan(c, 0.5).rows
    assert asked[5] == "asked" and asked[6] == 6  # the fewest that can decide


def test_seeds_of_a_pilot_that_is_not_registered_do_not_count(tmp_path):
    facts = {"arms": (("R0", {}), ("R1", {})), "contrasts": (), "study": campaign.STUDY, "seeds": (1, 2, 3)}
    (row,) = power.plan(load.read(campaign.write(tmp_path, noisy, **facts))).rows
    assert row[6] == row[7]


def test_two_pairs_are_no_pilot(tmp_path, capsys):
    made = pair(tmp_path, noisy, seeds=(1, 2))
    with pytest.raises(PilotError, match="run a pilot of 3"):
        power.plan(load.read(made))
    assert cli.main(["power", f"CAMPAIGN={made.path}"]) == 2
    made = pair(tmp_path, noisy, name="big", seeds=(1, 2, 3))
    assert cli.main(["power", f"CAMPAIGN={made.path}", "EFFECT=0.01"]) == 0
    assert "sd 80% bound" in capsys.readouterr().out


# placebo


def test_placebo_pools_all_campaigns_that_could_decide(tmp_path, capsys):
    steady = lambda arm, seed: 2 + 0.01 * ((seed * 7) % 5)
    shifted = lambda arm, seed: steady(arm, seed) + (0.5 if arm[0] == "placebo1" else 0)
    for i in range(3):
        campaign.write(tmp_path, steady, name=f"good{i}", seeds=SEEDS, **AA)
    campaign.write(tmp_path, shifted, name="few", seeds={"R0": (1, 2), "placebo1": (3, 4)}, **AA)
    found, text = power.placebo(tmp_path)
    assert len(found.rows) == 4 and text.startswith(
        "0 false of 3 that could be decided: 0.0%, 90 % interval 0.0% to 63.2%"
    )
    campaign.write(tmp_path, shifted, name="bad", seeds=SEEDS, **AA)
    assert power.placebo(tmp_path)[1].startswith("1 false of 4")
    assert cli.main(["placebo", f"O={tmp_path}"]) == 0
    assert "1 false of 4" in capsys.readouterr().out
    assert "no placebo comparison" in power.placebo(tmp_path / "none")[1]


# noise


def test_noise_is_split_into_seeds_and_the_same_seed_again(tmp_path):
    one = load.read(pair(tmp_path, noisy, name="one", seeds=(1, 2, 3)))
    two = load.read(pair(tmp_path, lambda a, s: noisy(a, s) + 0.002 * s, name="two", seeds=(1, 2, 3)))
    assert [row[0] for row in power.noise(one).rows] == ["seeds"]
    seeds, again = power.noise(one, [two]).rows
    assert seeds[1] == pytest.approx(np.sqrt(np.mean([np.var([noisy(a, s) for s in (1, 2, 3)], ddof=1) for a in ARMS])))
    assert again[1] == pytest.approx(np.sqrt(np.mean([(0.002 * s) ** 2 / 2 for s in (1, 2, 3)])))


def test_a_metric_that_no_seed_changes_gets_no_test():
    fixed = {"title": "", "where": "", "failed": (), "waiting": 0, "hours": None, "left": "R1", "right": "R0"}
    a, b = ({s: value for s in range(3)} for value in (1.0, 2.0))
    (told,) = stats.judge([Contrast(a=a, b=b, **fixed)], Rule(better="lower", fixed=True))
    assert (told.word, told.p) == ("better", None)
    (tested,) = stats.judge([Contrast(a=a, b=b, **fixed)], Rule(better="lower"))
    assert tested.word == "cannot decide at n=3"
