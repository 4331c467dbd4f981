# SPDX-License-Identifier: MIT
"""Whole trials that prune: rows, contracts, ends, resume."""

import os
import signal

import pytest
import torch

from ablab import checkpoint, plan, rundir
from ablab.prune._mask import Mask
from ablab.report import load
from tests import trial as tiny
from tests.test_images import IMAGES
from tests.test_resume import disturbed

PRUNED = "CONFIG_PRUNE_MAGNITUDE=y\nCONFIG_PRUNE_WARMUP=4\nCONFIG_PRUNE_INTERVAL=2\n"
SPAM = "CONFIG_OPT_ADAMWSPAM=y\nCONFIG_OPT_ADAMWSPAM_PROFILE_LAB=y\nCONFIG_OPT_ADAMWSPAM_INTERVAL=9\n"
SPAM += "CONFIG_OPT_ADAMWSPAM_REWARM=3\nCONFIG_OPT_ADAMWSPAM_GRACE=2\n"


def run(tmp_path, extra, before=lambda: None):
    trial = tiny.campaign(tmp_path, extra)
    attempt = tiny.claim(trial)
    return trial, attempt, os.waitstatus_to_exitcode(tiny.forked(attempt, before))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    trial, attempt, code = run(tmp_path_factory.mktemp("whole"), PRUNED + SPAM)
    assert code == 0, attempt.log.read_text()
    return trial


def test_rows_and_contracts_show_the_sparsity(whole):
    rows = [r["m"] for r in rundir.rows(whole)]
    seen = [(m["sparsity"], m["sparsity/target"], m["sparsity/mask"]) for m in rows if "val_loss" in m]
    assert [s for s, *_ in seen] == [m for *_, m in seen] == sorted(s for s, *_ in seen)
    assert seen[-1] == (0.5, 0.5, 0.5) and seen[0] == (0.0, 0.0, 0.0)
    whole_size = whole.summary()["model"]["params"]
    assert [m["sparsity/total"] for m in rows if "val_loss" in m][-1] == pytest.approx(8192 / whole_size)
    assert all(abs(s - t) < 1e-4 for s, t, _ in seen)
    assert sum("sparsity/blocks.0.mlp.up.weight" in m for m in rows) == len(seen) == 6
    assert [m["memory/masks_gib"] for m in rows if "memory/masks_gib" in m] == [16384 / 2**30]
    assert all(
        {"opt/spike_frac", "opt/soft_reset_frac", "opt/rewarm"} <= m.keys() for m in rows if "learning_rate" in m
    )
    contracts = {c["name"]: c for c in whole.summary()["contracts"]}
    assert all(contracts[f"prune/{name}"]["ok"] for name in ("sparsity", "mask", "final"))
    assert contracts["prune/final"]["measured"] == 0.5


@pytest.mark.parametrize("point", [60, 100, 130])
def test_a_stop_is_resumed_bitwise_equal(tmp_path, whole, point):
    trial = tiny.campaign(tmp_path, PRUNED + SPAM)
    states = disturbed(trial, [point], signal.SIGTERM)
    assert states[0] in ("preempted", "interrupted") and states[1:] == ["done"]
    assert tiny.outcome(trial) == tiny.outcome(whole)


def test_the_checkpoint_of_the_target_stays_and_a_sparse_one_is_the_same(tmp_path, whole):
    """Ten more steps than the ramp has, and what the ramp ended with is still there."""
    assert [c.step for c in whole.saved()] == [20, 15]
    more = "CONFIG_TRAIN_STEPS=40\nCONFIG_TRAIN_CKPT_KEEP=1\n"
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    trial, attempt, code = run(tmp_path / "a", PRUNED + more)
    assert code == 0, attempt.log.read_text()
    assert [c.step for c in trial.saved()] == [40, 30]
    w = checkpoint.read(trial.saved()[1].model)["blocks.0.mlp.up.weight"]
    assert 0.2 < float((w == 0).float().mean()) < 0.8
    again, attempt, code = run(
        tmp_path / "b", PRUNED + more + "CONFIG_TRAIN_CKPT_SPARSE=y\nCONFIG_TRAIN_CKPT_TARGET=n\n"
    )
    assert code == 0, attempt.log.read_text()
    (last,) = again.saved()
    one, two = checkpoint.read(trial.saved()[0].model), checkpoint.read(last.model)
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
    assert last.model.stat().st_size < 0.8 * trial.saved()[0].model.stat().st_size


@pytest.mark.parametrize("point", [90, 130])
def test_a_stop_under_sparse_checkpoints_is_resumed_bitwise_equal(tmp_path, point):
    extra = PRUNED + SPAM + "CONFIG_TRAIN_CKPT_SPARSE=y\n"
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    undisturbed, attempt, code = run(tmp_path / "a", extra)
    assert code == 0, attempt.log.read_text()
    trial = tiny.campaign(tmp_path / "b", extra)
    assert disturbed(trial, [point], signal.SIGTERM)[1:] == ["done"]
    assert tiny.outcome(trial)["hashes"] == tiny.outcome(undisturbed)["hashes"]


def test_masks_that_are_not_applied_fail_the_trial(tmp_path):
    def before():
        Mask.apply = lambda self, *flats: None

    _, attempt, code = run(tmp_path, PRUNED, before)
    said = attempt.read("exit")
    assert code == 1 and (said["state"], said["class"]) == ("failed", "effect")
    assert "prune/zeros: expected 3705 of 16384, measured 3705 in the mask and 0 in the weights" in said["message"]


def test_a_dense_trial_with_zeros_fails(tmp_path):
    def before():
        from ablab.train import Loop

        real = Loop.train_step

        def train_step(self):
            real(self)
            with torch.no_grad():
                self.built.model.get_parameter("blocks.0.mlp.up.weight")[0] = 0

        Loop.train_step = train_step

    _, attempt, code = run(tmp_path, "", before)
    said = attempt.read("exit")
    assert code == 1 and said["class"] == "effect" and "prune/dense" in said["message"]


def test_a_ramp_beyond_the_budget_is_refused(tmp_path):
    extra = PRUNED.replace("WARMUP=4", "WARMUP=15")
    with pytest.raises(plan.PlanError, match="CONFIG_PRUNE_WARMUP=15: the ramp of pruning must end after it"):
        tiny.campaign(tmp_path, extra)
    _, attempt, code = run(
        tmp_path, IMAGES + PRUNED.replace("WARMUP=4", "WARMUP=16")
    )  # who plans 22 steps is not asked
    assert code == 2 and "CONFIG_PRUNE_WARMUP = 16" in attempt.read("exit")["message"]


@pytest.mark.parametrize("fraction, step_s", [(0.75, 0.1), (1.0, 0.1), (0.75, 0.7)])  # then none begins after 75 %
@pytest.mark.parametrize("scope", ["FULL", "WEIGHTS"])
def test_a_budget_of_seconds_reaches_the_end_of_the_ramp(tmp_path, fraction, step_s, scope):
    def before():
        from ablab.window import Clocks

        real, steps = Clocks.to, []

        def to(self, name):
            steps.extend([name] * (name == "optimizer"))
            real(self, name)

        Clocks.to, Clocks.training = to, lambda self: step_s * len(steps)

    extra = PRUNED.replace("WARMUP=4", "WARMUP=2") + "CONFIG_TRAIN_BUDGET_TIME=y\nCONFIG_TRAIN_TIME=2\n"
    extra += f'CONFIG_PRUNE_RAMP_FRACTION="{fraction}"\nCONFIG_PRUNE_SCOPE_{scope}=y\n'
    trial, attempt, code = run(tmp_path, extra, before)
    assert code == 0, attempt.log.read_text()
    last = [r["m"]["sparsity"] for r in rundir.rows(trial) if "sparsity" in r["m"]][-1]
    assert last == 0.5


def test_models_that_are_less_sparse_are_neither_best_nor_a_reason_to_stop(tmp_path):
    extra = PRUNED + "CONFIG_TRAIN_STOP_PATIENCE=1\nCONFIG_TRAIN_CKPT_TOP=6\nCONFIG_EVAL_INTERVAL=1\n"
    extra += 'CONFIG_PRUNE_SPARSITY="0.9"\nCONFIG_OPT_LR="0.05"\nCONFIG_SCHED_WARMUP=0\nCONFIG_SCHED_CONSTANT=y\n'
    trial = tiny.campaign(tmp_path, extra)
    path = trial.campaign.file("campaign")
    path.write_text(path.read_text().replace('"mode": "final"', '"mode": "max"'))
    trial = rundir.Campaign(trial.campaign.path).trial(trial.name)
    attempt = tiny.claim(trial)
    assert tiny.forked(attempt) == 0, attempt.log.read_text()
    losses = {r["step"]: r["m"]["val_loss"] for r in rundir.rows(trial, ["val_loss"])}
    assert any(losses[step] > losses[step - 1] for step in range(1, 15))  # a reason to stop
    after = {step: loss for step, loss in losses.items() if step >= 15}  # of 20 steps, where the ramp ends
    step = min(after, key=after.get)
    assert trial.summary()["best"]["val_loss"] == {"value": after[step], "step": step}
    assert {c.step for c in trial.saved()} == set(after)
    # nor do they count where the lowest or highest value is asked for
    most = max(after, key=after.get)
    targets = [(r["step"], r["m"]["sparsity/target"]) for r in rundir.rows(trial, ["sparsity/target"])]
    assert rundir.settled_from(targets) == 15 and after[most] < max(losses.values())
    assert trial.summary()["primary"] == {"key": "val_loss", "value": after[most], "direction": "lower", "step": most}
    assert tiny.ended(trial, attempt) == "done"
    (loaded,) = load.read(trial.campaign).trials
    assert loaded.value("val_loss", "min") == after[step] and loaded.value("val_loss", "max") == after[most]
