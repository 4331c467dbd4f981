# SPDX-License-Identifier: MIT
"""A trial that was stopped or killed anywhere ends with the weights, rows and summary of one that was not."""

import os
import random
import signal

import pytest

from tests import trial as tiny

DROPOUT = 'CONFIG_MODEL_GPT_DROPOUT="0.1"\n'  # random state must survive too
EVENTS = 200  # of an undisturbed attempt, about


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
    assert [step for step, *_ in undisturbed["rows"]] == [0, 3, 4, 6, 8, 9, 12, 15, 16, 18, 20]


@pytest.mark.parametrize("point", [3, 20, 40, 57, 71, 90, 110])
def test_a_stop_is_resumed_bitwise_equal(tmp_path, undisturbed, point):
    trial = tiny.campaign(tmp_path, DROPOUT)
    states = disturbed(trial, [point], signal.SIGTERM)
    assert states[0] in ("preempted", "interrupted") and states[1:] == ["done"]
    assert tiny.outcome(trial) == undisturbed


@pytest.mark.parametrize("seed", range(4))
def test_random_kills_are_resumed_bitwise_equal(tmp_path, undisturbed, seed):
    trial = tiny.campaign(tmp_path, DROPOUT)
    dice = random.Random(seed)
    states = disturbed(trial, [dice.randrange(10, EVENTS) for _ in range(4)], signal.SIGKILL)
    assert "dead" in states
    assert tiny.outcome(trial) == undisturbed
