# SPDX-License-Identifier: MIT
"""Lenses read the same trials at another budget: nothing is extrapolated, and what turns the order is named."""

from functools import partial

import pytest

from ablab.report import lens, load
from tests.report import campaign

ARMS = (("R0", {}), ("R1", {}))
FINALS = {"R0": 2.0, "R1": 1.9}
write = partial(campaign.write, arms=ARMS, seeds=(1, 2), contrasts=[("R1", "R0")])


def finals(arm, seed):
    return FINALS[arm[0]]


def named(folder):
    return {found.name: found for found in lens.lenses(load.read(folder))}


def slow(arm):
    """R1 takes twice the seconds for a step, and more memory."""
    perf = {"tok_per_s": 1.0, "step_ms_p50": 1.0, "step_ms_p95": 1.0, "mfu": None}
    return {"step_s": 0.2 if arm[0] == "R1" else 0.1, "perf": perf | {"peak_mem_bytes": 200 + 100 * (arm[0] == "R1")}}


def test_equal_budgets_show_the_registered_order(tmp_path):
    found = named(write(tmp_path, finals))
    assert set(found) == {"train_s", "tokens", "flops", "memory"}
    for each in found.values():
        assert {k: p.value for k, p in each.arms.items()} == pytest.approx(FINALS)
        assert [(p.rank, p.registered) for p in each.arms.values()] == [(2, 2), (1, 1)]
        assert not each.flips and not any(p.mid_schedule for p in each.arms.values())


def test_a_slow_arm_is_read_where_the_fast_one_ends(tmp_path):
    found = named(write(tmp_path, finals, outcome=slow))
    time, tokens = found["train_s"], found["tokens"]
    assert time.at == pytest.approx(20.0) and time.arms["R1"].used == pytest.approx(40.0)
    # half of its steps: the curve of the fixture there, which is an evaluation point
    assert time.arms["R1"].value == pytest.approx(campaign.loss(1.9, campaign.STEPS // 2))
    assert time.arms["R0"].value == pytest.approx(2.0)
    assert time.flips == (("R1", "R0"),) and tokens.flips == ()
    assert [(p.rank, p.registered) for p in time.arms.values()] == [(1, 2), (2, 1)]


def test_a_point_inside_the_decay_is_marked(tmp_path):
    constant = {"rates": [[1, 0.0, 1e-3], [100, 0.5, 1e-3], [200, 1.0, 1e-3]]}
    decays, stays, unknown = (
        named(write(tmp_path, finals, name=n, outcome=lambda arm: slow(arm) | more))["train_s"].arms
        for n, more in (("a", {}), ("b", constant), ("c", {"rates": None}))
    )
    assert [decays["R1"].mid_schedule, stays["R1"].mid_schedule, unknown["R1"].mid_schedule] == [True, False, True]
    assert not decays["R0"].mid_schedule


def test_a_trial_that_stopped_early_is_mid_schedule_at_its_own_end(tmp_path):
    early = {"rates": [[1, 0.0, 1e-3], [100, 0.5, 6e-4], [120, 0.6, 5e-4]]}
    found = named(write(tmp_path, finals, outcome=lambda arm: early))
    assert all(p.mid_schedule for p in found["tokens"].arms.values())


def test_memory_leaves_out_the_arm_that_needs_more(tmp_path):
    memory = named(write(tmp_path, finals, outcome=slow))["memory"]
    assert (memory.at, memory.arms["R0"].value, memory.arms["R1"].value) == (200, 2.0, None)
    assert memory.arms["R1"].used == 300 and memory.arms["R1"].rank is None


def test_between_two_evaluations_the_value_is_interpolated(tmp_path):
    pace = {"R0": 0.1, "R1": 0.15}
    found = named(write(tmp_path, finals, outcome=lambda arm: {"step_s": pace[arm[0]]}))["train_s"]
    step = 20.0 / 0.15  # 133.3, between the evaluations at 120 and 140
    low, high = campaign.loss(1.9, 120), campaign.loss(1.9, 140)
    assert found.arms["R1"].value == pytest.approx(low + (high - low) * (step - 120) / 20)


def test_one_arm_with_a_result_has_no_lens(tmp_path):
    fates = {f"r1-s{s}": "failed" for s in (1, 2)}
    assert named(write(tmp_path, finals, fates=fates)) == {}
