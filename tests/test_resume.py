# SPDX-License-Identifier: MIT
"""A trial that was stopped or killed anywhere ends with the weights, rows and summary of one that was not."""

import os
import random
import signal

import pytest
import torch

from ablab import checkpoint
from ablab.attempt import Attempt
from tests import trial as tiny

DROPOUT = 'CONFIG_MODEL_GPT_DROPOUT="0.1"\n'  # random state must survive too
EVENTS = 190  # of an undisturbed attempt, about
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole")
    trial = tiny.campaign(path, DROPOUT)
    attempt = tiny.claim(trial)
    assert tiny.forked(attempt) == 0, attempt.log.read_text()
    return tiny.outcome(trial)


def disturbed(trial, points, signum):
    """Run a trial with a signal at each of `points`, then to its end; the states of the attempts."""
    states = []
    for point in points:
        attempt = tiny.claim(trial)
        status = tiny.forked(attempt, tiny.signalled(point, signum))
        states.append(tiny.ended(trial, attempt))
        if states[-1] == "done":
            break
        code = os.waitstatus_to_exitcode(status)
        assert code == -signum if signum == signal.SIGKILL else code in (75, 143), attempt.log.read_text()
    while states[-1] != "done":
        attempt = tiny.claim(trial)
        assert tiny.forked(attempt) == 0, attempt.log.read_text()
        states.append(tiny.ended(trial, attempt))
    return states


def test_an_undisturbed_trial_is_done(undisturbed):
    assert undisturbed["flaw"] is None and undisturbed["step"] == 20
    assert [step for step, *_ in undisturbed["rows"]] == [0, 3, 4, 6, 8, 9, 12, 15, 16, 18, 20, 20]


@pytest.mark.parametrize("point", [3, 57, 90, *(pytest.param(p, marks=SLOW) for p in range(20, EVENTS, 9))])
def test_a_stop_is_resumed_bitwise_equal(tmp_path, undisturbed, point):
    trial = tiny.campaign(tmp_path, DROPOUT)
    states = disturbed(trial, [point], signal.SIGTERM)
    assert states[0] in ("preempted", "interrupted") and states[1:] == ["done"]
    assert tiny.outcome(trial) == undisturbed


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(s, marks=SLOW) for s in range(2, 20))])
def test_random_kills_are_resumed_bitwise_equal(tmp_path, undisturbed, seed):
    trial = tiny.campaign(tmp_path, DROPOUT)
    dice = random.Random(seed)
    states = disturbed(trial, [dice.randrange(10, EVENTS) for _ in range(3)], signal.SIGKILL)
    assert "dead" in states
    assert tiny.outcome(trial) == undisturbed


def test_a_checkpoint_that_kills_two_loads_is_not_tried_again(tmp_path, undisturbed):
    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def before():
        checkpoint.load = die

    trial = tiny.campaign(tmp_path, DROPOUT)
    first = tiny.claim(trial)
    tiny.forked(first, tiny.signalled(110, signal.SIGTERM))
    assert tiny.ended(trial, first) == "preempted"
    newest = trial.saved()[0].name
    for _ in range(2):
        attempt = tiny.claim(trial)
        assert tiny.forked(attempt, before) == signal.SIGKILL
        assert tiny.ended(trial, attempt) == "dead"
    last = tiny.claim(trial)
    assert tiny.forked(last) == 0, last.log.read_text()
    assert last.read("manifest")["resume"]["checkpoint"] != newest
    assert f"renamed to bad-{newest}" in last.log.read_text()
    assert tiny.outcome(trial) == undisturbed


def test_a_resume_under_other_conditions_is_refused_with_each_key(tmp_path):
    trial = tiny.campaign(tmp_path)
    first = tiny.claim(trial)
    tiny.forked(first, tiny.signalled(110, signal.SIGTERM))
    assert tiny.ended(trial, first) == "preempted"
    manifest = trial.manifest()
    manifest["software"]["torch"], manifest["resolved"]["threads"] = "1.0", 7
    trial.write("manifest", {k: v for k, v in manifest.items() if k != "schema"})
    second = tiny.claim(trial)
    assert os.waitstatus_to_exitcode(tiny.forked(second)) == 2
    said = second.read("exit")
    assert (said["state"], said["class"]) == ("refused", "config")
    assert said["message"].splitlines()[1:3] == [
        "resolved.threads: 7 before, 1 now",
        f"software.torch: 1.0 before, {torch.__version__} now",
    ]


def test_drift_that_is_allowed_is_recorded(tmp_path):
    trial = tiny.campaign(tmp_path)
    first = tiny.claim(trial)
    tiny.forked(first, tiny.signalled(110, signal.SIGTERM))
    tiny.ended(trial, first)
    manifest = trial.manifest()
    manifest["software"]["torch"] = "1.0"
    trial.write("manifest", {k: v for k, v in manifest.items() if k != "schema"})
    second = tiny.claim(trial)
    trial.write("lease", {**trial.lease(), "allow_drift": ["software"]})
    assert tiny.forked(second) == 0, second.log.read_text()
    assert second.read("manifest")["resume"]["drift"] == ["software.torch"]


def test_a_changed_configuration_is_not_trained(tmp_path):
    trial = tiny.campaign(tmp_path)
    trial.config.write_text(trial.config.read_text().replace("CONFIG_TRAIN_STEPS=20", "CONFIG_TRAIN_STEPS=30"))
    attempt = tiny.claim(trial)
    assert os.waitstatus_to_exitcode(tiny.forked(attempt)) == 2
    assert "is not what was planned" in attempt.read("exit")["message"]


def test_an_owner_that_lost_its_lease_publishes_nothing(tmp_path):
    trial = tiny.campaign(tmp_path)
    attempt = tiny.claim(trial)

    def before():
        real, left = Attempt.moved, [30]

        def moved(self):
            left[0] -= 1
            if left[0] == 0:  # as a runner does that took this owner for dead
                lease = self.trial.lease()
                self.trial.write("lease", {**lease, "lease": lease["lease"] + 1})
            real(self)

        Attempt.moved = moved

    assert os.waitstatus_to_exitcode(tiny.forked(attempt, before)) == 75
    assert attempt.read("exit")["class"] == "lost"
    assert trial.summary() is None and trial.read("done") is None
    assert all(c.step < 10 for c in trial.saved()) and trial.status()["phase"] == "train"
