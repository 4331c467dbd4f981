# SPDX-License-Identifier: MIT
"""kill -9 of children and runners: what is left continues to the results of an undisturbed campaign."""

import hashlib
import json
import os
import random
import signal

import pytest

from ablab import run, rundir
from ablab.journal import Journal
from tests.run import drive

STEPS = 60
WISH = {"steps": STEPS, "step_s": 0.005, "every": 3}
MANY = {"dead": 1000, "preempted": 1000, "interrupted": 1000}


def chain(trial) -> str:
    """The weights that the steps of a trial lead to, whoever runs them."""
    weights = "0" * 64
    for step in range(1, STEPS + 1):
        weights = hashlib.sha256(f"{trial.record['hash']} {step} {weights}".encode()).hexdigest()
    return weights


def check_results(campaign) -> None:
    """Each trial is done once, its weights are those of the chain, its rows are complete and unique."""
    assert drive.states(campaign) == ["done"] * len(campaign.records())
    lines = [json.loads(line) for line in campaign.journal.read_text().splitlines()[1:]]
    ends = [r["trial"] for r in lines if r.get("to") == "done"]
    assert sorted(ends) == sorted(campaign.records())
    assert Journal.of(campaign).replay().problems == []
    for trial in campaign.trials():
        assert trial.flaw() is None
        assert trial.summary()["model"]["fingerprint"] == chain(trial)
        assert [r["step"] for r in rundir.rows(trial)] == list(range(1, STEPS + 1))
        # what a runner leaves that is killed while it writes a lease stays, and harms nobody
        left = [*trial.path.glob("*.tmp-*"), *trial.checkpoints.glob("*.tmp-*")]
        assert [p for p in left if not p.name.startswith("lease.json.tmp-")] == []


def finish(campaign) -> None:
    """Continue until nothing is left."""
    code = 75
    while code == 75:
        code = run.resume(campaign, drive.options())
    assert code == 0


@pytest.mark.parametrize("kills", [12, pytest.param(50, marks=pytest.mark.slow)])
def test_random_kills_change_nothing(tmp_path, kills):
    campaign = drive.make(tmp_path, [WISH] * (kills // 3), retries=MANY)
    dice = random.Random(kills)
    runner, done = drive.popen("continue", campaign.path), 0
    while done < kills and (victims := drive.victims(campaign)):
        with drive.pause(dice.random() * 0.1):
            victim = dice.choice([runner.pid, *victims])
        drive.kill(victim)
        done += 1
        if victim == runner.pid:
            runner.communicate()
            runner = drive.popen("continue", campaign.path)
    runner.communicate()
    finish(campaign)
    assert done >= kills // 2  # a fast machine may finish before the last one
    check_results(campaign)


def test_a_child_outlives_its_runner_and_is_adopted(tmp_path, capsys):
    campaign = drive.make(tmp_path, [{**WISH, "step_s": 0.03}], jobs=1)
    runner = drive.popen("continue", campaign.path)
    drive.wait(lambda: drive.running(campaign))
    drive.kill(runner.pid)
    out, _ = runner.communicate()  # returns at once: no child holds the pipe
    assert "done" not in out and drive.running(campaign)
    assert run.resume(campaign, drive.options()) == 0
    assert "goes on; its runner is gone" in capsys.readouterr().out
    assert drive.attempts(campaign) == [1]
    check_results(campaign)


def test_a_child_that_ended_alone_counts(tmp_path):
    campaign = drive.make(tmp_path, [WISH], jobs=1)
    runner = drive.popen("continue", campaign.path)
    drive.wait(lambda: drive.running(campaign))
    drive.kill(runner.pid)
    runner.communicate()
    (trial,) = campaign.trials()
    drive.wait(lambda: trial.attempt(1).exit.exists())
    assert drive.states(campaign) == ["running"]
    assert run.resume(campaign, drive.options()) == 0
    assert drive.attempts(campaign) == [1]
    check_results(campaign)


@pytest.mark.parametrize("count", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_several_continues_at_once_do_each_trial_once(tmp_path, count):
    campaign = drive.make(tmp_path, [WISH] * 3 * count, jobs=2, retries=MANY)
    runners = [drive.popen("continue", campaign.path) for _ in range(count)]
    codes = [(r.communicate(), r.returncode)[1] for r in runners]
    assert codes == [0] * count
    assert drive.attempts(campaign) == [1] * 3 * count
    check_results(campaign)


def test_several_continues_killed_at_random_finish_the_campaign(tmp_path):
    campaign = drive.make(tmp_path, [WISH] * 6, jobs=2, retries=MANY)
    dice = random.Random(7)
    runners = [drive.popen("continue", campaign.path) for _ in range(3)]
    drive.wait(lambda: drive.running(campaign))
    for runner in runners[:2]:
        with drive.pause(dice.random() * 0.1):
            drive.kill(runner.pid)
            runner.communicate()
    runners[2].communicate()
    assert runners[2].returncode == 0
    check_results(campaign)


def test_a_stopped_runner_that_wakes_up_changes_nothing(tmp_path):
    campaign = drive.make(tmp_path, [WISH, WISH], jobs=1)
    sleeper = drive.popen("continue", campaign.path)
    drive.wait(lambda: drive.running(campaign))
    os.kill(sleeper.pid, signal.SIGSTOP)
    assert run.resume(campaign, drive.options()) == 0
    before = campaign.journal.read_bytes()
    os.kill(sleeper.pid, signal.SIGCONT)
    sleeper.communicate()
    assert sleeper.returncode == 0
    assert campaign.journal.read_bytes() == before
    check_results(campaign)


def test_a_stopped_child_is_replaced_after_the_grace_time(tmp_path):
    campaign = drive.make(tmp_path, [WISH], jobs=1, grace_s=1)
    runner = drive.popen("continue", campaign.path)
    drive.wait(lambda: drive.running(campaign))
    os.kill(drive.running(campaign)[0], signal.SIGSTOP)
    out, _ = runner.communicate()
    assert runner.returncode == 0 and "no heartbeat for 1 s" in out
    assert drive.attempts(campaign) == [2]
    check_results(campaign)


def test_real_training_resumes_bit_for_bit(tmp_path, capsys):
    """A runner is killed, then each child between two checkpoints: the weights of an undisturbed campaign."""
    todo, options = drive.real(tmp_path / "calm", "ablab.train:main")
    assert run.start(todo, options) == 0
    todo, options = drive.real(tmp_path / "disturbed", "tests.accept.faults:killed")
    runner = drive.popen("start", tmp_path / "disturbed", "tests.accept.faults:killed")
    drive.wait(lambda: any(tmp_path.glob("disturbed/*/trials/*/attempts/1/log.txt")))
    drive.kill(runner.pid)
    runner.communicate()
    assert run.start(todo, options) == 0
    assert "continues tiny-" in capsys.readouterr().out
    (calm,), (disturbed,) = (rundir.campaigns(tmp_path / name) for name in ("calm", "disturbed"))
    assert drive.attempts(calm) == [1, 1] and drive.attempts(disturbed) == [2, 2]
    for a, b in zip(calm.trials(), disturbed.trials(), strict=True):
        assert a.saved()[0].model.read_bytes() == b.saved()[0].model.read_bytes()
        assert facts(a) == facts(b)
        assert losses(a) == losses(b)


def losses(trial) -> list[tuple[int, dict[str, float]]]:
    return [(r["step"], r["m"]) for r in rundir.rows(trial, ["train_loss", "val_loss", "grad_norm"])]


def facts(trial) -> dict:
    """A summary less what counts attempts, times and memory."""
    summary = trial.summary()
    final = {k: v for k, v in summary["final"].items() if "loss" in k or "perplexity" in k}
    used = {k: summary["used"][k] for k in ("steps", "tokens")}
    kept = {k: summary[k] for k in ("trial", "stop", "primary", "best", "model", "contracts")}
    return {**kept, "final": final, "used": used}
