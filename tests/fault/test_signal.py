# SPDX-License-Identifier: MIT
"""Stops: children save once and end, the runner exits resumable; a child that does not obey is ended."""

import os
import signal

import pytest

from ablab import machine, run
from ablab.journal import Journal
from tests.run import drive

WISH = {"steps": 40, "step_s": 0.02, "every": 1000}


def started(tmp_path, wishes, *arguments, **policy):
    """A campaign and a runner whose children train."""
    campaign = drive.make(tmp_path, wishes, **policy)
    runner = drive.popen("continue", campaign.path, *arguments)
    drive.wait(lambda: len(drive.running(campaign)) == len(wishes))
    return campaign, runner


def saves(campaign, attempt=1) -> list[int]:
    return [t.attempt(attempt).log.read_text().count("saved step") for t in campaign.trials()]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_once_and_continue_resumes(tmp_path, signum):
    campaign, runner = started(tmp_path, [WISH, WISH])
    runner.send_signal(signum)
    out, _ = runner.communicate()
    assert runner.returncode == 75 and f"{signum.name}: 2 running save and stop" in out
    assert out.splitlines()[-1].startswith("RESULT: exit=75 done=0 preempted=2")
    assert saves(campaign) == [1, 1]
    assert run.resume(campaign, drive.options()) == 0
    assert drive.attempts(campaign) == [2, 2]


def test_a_second_signal_does_not_abort_a_save(tmp_path):
    campaign, runner = started(tmp_path, [WISH])
    for _ in range(3):
        runner.send_signal(signal.SIGTERM)
    runner.communicate()
    assert runner.returncode == 75 and saves(campaign) == [1]


def test_a_signal_to_the_whole_group_stops_the_same_way(tmp_path):
    campaign = drive.make(tmp_path, [WISH])
    runner = drive.popen("continue", campaign.path, group=True)
    drive.wait(lambda: drive.running(campaign))
    os.killpg(runner.pid, signal.SIGTERM)
    runner.communicate()
    assert runner.returncode == 75 and saves(campaign) == [1]


def test_a_second_interrupt_ends_a_deaf_child(tmp_path):
    campaign, runner = started(tmp_path, [{"mode": "deaf", "steps": 2}], "last_s=0.2")
    runner.send_signal(signal.SIGINT)
    assert "SIGINT: 1 running" in runner.stdout.readline()  # two signals that are pending at once are one
    runner.send_signal(signal.SIGINT)
    out, _ = runner.communicate()
    assert runner.returncode == 130 and "after the second interrupt" in out
    assert drive.states(campaign) == ["interrupted"] and campaign.status()["exit"] == 130


def test_make_stop_reaches_the_runner(tmp_path):
    campaign, runner = started(tmp_path, [WISH])
    assert "1 running" in run.stop(campaign)
    assert campaign.stop_file.exists()
    runner.communicate()
    assert runner.returncode == 75 and saves(campaign) == [1]
    assert run.resume(campaign, drive.options()) == 0


def test_make_stop_reaches_a_child_without_runner(tmp_path):
    campaign, runner = started(tmp_path, [WISH])
    drive.kill(runner.pid)
    runner.communicate()
    (pid,) = drive.running(campaign)
    run.stop(campaign)
    drive.wait(lambda: machine.proc_start(pid) is None)
    assert saves(campaign) == [1]
    assert run.resume(campaign, drive.options()) == 0
    assert drive.attempts(campaign) == [2]


def test_the_end_of_the_allocation_stops_in_time(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1")
    campaign = drive.make(tmp_path, [WISH])
    assert run.resume(campaign, drive.options()) == 75
    assert drive.states(campaign) == ["queued"]


def test_a_hanging_child_leaves_its_stacks_and_ends_dead(tmp_path, capsys):
    campaign = drive.make(tmp_path, [{"mode": "hang"}], hang_s=1, retries={"dead": 0})
    assert run.resume(campaign, drive.options()) == 1
    (trial,) = campaign.trials()
    entry = Journal.of(campaign).replay().entry(trial.name)
    assert entry.state == "failed" and entry.cls == "hang"
    assert "no progress for 1 s in phase train" in capsys.readouterr().out
    assert "tests/run/child.py" in trial.attempt(1).stacks.read_text()


def test_a_hanging_child_that_ignores_the_stop_is_killed(tmp_path):
    campaign = drive.make(tmp_path, [{"mode": "deaf"}], hang_s=1, retries={"dead": 0})
    assert run.resume(campaign, drive.options(yield_s=0.2)) == 1
    assert Journal.of(campaign).replay().entry(campaign.trials()[0].name).cls == "hang"
