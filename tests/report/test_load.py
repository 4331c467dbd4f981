# SPDX-License-Identifier: MIT
"""A campaign folder is read for what it proves: states, values, arms, and what may be ranked."""

import pytest

from ablab.journal import Journal, TrialState
from ablab.report import load
from tests.report import campaign


def finals(arm, seed):
    return 2.0 + 0.1 * seed - (0.5 if arm[0] == "R1" else 0)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """One trial of every fate: done, failed, running, queued."""
    fates = {"r1-s2": "failed", "r0-s3": "running", "r1-s3": "queued"}
    arms = (("R0", {}), ("R1", {}))
    path = tmp_path_factory.mktemp("results")
    return load.read(campaign.write(path, finals, arms=arms, seeds=(1, 2, 3), contrasts=[("R1", "R0")], fates=fates))


def test_states_and_arms_follow_plan_and_journal(mixed):
    assert [t.id for t in mixed.trials] == ["r0-s1", "r1-s1", "r0-s2", "r1-s2", "r0-s3", "r1-s3"]
    assert [t.state for t in mixed.trials] == ["done", "done", "done", "failed", "running", "queued"]
    assert {text: [t.seed for t in arm.trials] for text, arm in mixed.arms.items()} == {
        "R0": [1, 2, 3],
        "R1": [1, 2, 3],
    }


def test_only_done_trials_have_a_value(mixed):
    assert mixed.arms["R0"].by_seed("val_loss", "final") == {1: 2.1, 2: 2.2}
    assert mixed.arms["R1"].by_seed("val_loss", "final") == {1: 1.6}


def test_final_min_and_max_come_from_the_rows(mixed):
    trial = mixed.trials[0]
    start, end = campaign.loss(2.1, 0), campaign.loss(2.1, campaign.STEPS)
    assert (trial.value("val_loss", "max"), trial.value("val_loss", "min")) == (start, pytest.approx(end))
    assert trial.value("val_loss", "final") == 2.1
    assert trial.value("grad_norm", "final") is None


def test_a_hand_edited_trial_is_damaged_and_has_no_value(tmp_path):
    folder = campaign.write(tmp_path, finals, arms=(("R0", {}), ("R1", {})), seeds=(1,))
    path = folder.trials()[0].file("summary")
    path.write_text(path.read_text().replace('"val_loss": 2.1', '"val_loss": 1.1'))
    trial = load.read(folder).trials[0]
    assert trial.state == load.DAMAGED and trial.is_lost and str(path) in trial.reason
    assert trial.value("val_loss") is None and trial.summary is None


def test_a_trial_whose_done_vanished_is_damaged(tmp_path):
    folder = campaign.write(tmp_path, finals, arms=(("R0", {}),), seeds=(1,), contrasts=())
    folder.trials()[0].file("done").unlink()
    assert load.read(folder).trials[0].state == load.DAMAGED


def test_a_rerun_replaces_the_value(tmp_path):
    folder = campaign.write(tmp_path, finals, arms=(("R0", {}),), seeds=(1,), contrasts=())
    journal, trial = Journal.of(folder), folder.trials()[0]
    assert journal.append(trial.name, TrialState.QUEUED, reason="rerun")
    campaign.run(journal, trial, 1.25)
    again = load.read(folder).trials[0]
    assert (again.value("val_loss"), again.attempt) == (1.25, 2)
    assert again.points("val_loss")[-1] == (campaign.STEPS, pytest.approx(1.25))
    assert len(again.points("val_loss")) == campaign.STEPS // campaign.EVERY + 1


def test_extremes_are_those_at_the_last_sparsity(tmp_path):
    folder = campaign.write(tmp_path, finals, arms=(("R0", {}),), seeds=(1,), contrasts=())
    journal, trial = Journal.of(folder), folder.trials()[0]
    assert journal.append(trial.name, TrialState.QUEUED, reason="rerun")
    ramp = {step: min(step / 60, 0.5) for step in range(0, campaign.STEPS + 1, campaign.EVERY)}
    dense = {"val_loss": 0.5}  # better than all that follows, before anything is pruned
    rows = lambda step: {"sparsity/target": ramp[step], **(dense if step < 30 else {})}
    campaign.run(journal, trial, 1.25, outcome={"rows": rows})
    again = load.read(folder).trials[0]
    at = [campaign.loss(1.25, step) for step, level in ramp.items() if level == 0.5]
    assert len(at) > 1 and (again.value("val_loss", "max"), again.value("val_loss", "min")) == (max(at), min(at))


def test_a_failed_rerun_leaves_no_value(tmp_path):
    folder = campaign.write(tmp_path, finals, arms=(("R0", {}),), seeds=(1,), contrasts=())
    journal, trial = Journal.of(folder), folder.trials()[0]
    journal.append(trial.name, TrialState.QUEUED, reason="rerun")
    campaign.run(journal, trial, 1.25, "failed")
    again = load.read(folder).trials[0]
    assert again.state == "failed" and again.value("val_loss") is None


def test_steps_without_a_contrast_are_compared_with_their_parent_as_exploratory(tmp_path):
    folder = campaign.write(tmp_path, finals, seeds=(1,), contrasts=[("R1", "R0")])
    pairs = [(a.text, b.text, registered) for a, b, registered in load.read(folder).pairs()]
    assert pairs == [("R1", "R0", True), ("R2", "R1", False)]


def test_inputs_change_with_any_result_and_with_nothing_else(tmp_path):
    hashes = []
    for name, shift in (("a", 0.0), ("b", 0.0), ("c", 1e-9)):
        folder = campaign.write(
            tmp_path / name,
            lambda arm, seed, s=shift: finals(arm, seed) + s,
            arms=(("R0", {}),),
            seeds=(1, 2),
            contrasts=(),
        )
        hashes.append(load.read(folder).inputs())
    assert hashes[0] == hashes[1] != hashes[2]
