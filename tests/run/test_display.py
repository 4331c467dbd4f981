# SPDX-License-Identifier: MIT
"""What a run shows on a terminal and elsewhere."""

import pytest

from ablab import rundir
from ablab.journal import Journal
from ablab.run import _display
from tests import sample


@pytest.fixture
def trial(tmp_path):
    """A trial at step 1200 of 5000, with rows every 50 steps, 50 steps a second of 512 tokens each."""
    campaign = sample.campaign(tmp_path, 1)
    (trial,) = campaign.trials()
    lease = Journal.of(campaign).claim(trial)
    manifest = sample.manifest(trial, lease) | {"budget": {"kind": "steps", "limit": 5000}}
    trial.write("manifest", manifest)
    header = {"trial": trial.name, "attempt": 1, "resumed_at_step": 0}
    rows = rundir.Rows(trial.attempt(1).metrics, "metrics", header)
    for step in range(50, 1201, 50):
        m = {"train_loss": 3.4123, "learning_rate": 5.1e-4}
        rows.row(step, m, tokens=step * 512, train_s=step / 50, wall_s=step / 50, flops=0.0)
    rows.close()
    now = {"progress": 800, "step": 800, "tokens": 800 * 512, "train_s": 16.0, "loss": 3.6}
    status = sample.status(trial, lease, **now)
    del status["eta_s"]  # as before the first estimate
    trial.write("status", status)
    return trial


def screen(trial, tty=False, verbose=False):
    return _display.Screen(trial.campaign, [trial.name], tty, verbose)


def test_a_plain_line_has_step_loss_rate_speed_and_time_left(trial, capsys):
    shown = screen(trial)
    shown._due = 0.0
    shown.tick([trial])
    want = "[1/1 r0-s1337] step 1200/5000 loss 3.412 lr 5.1e-4 25.6k tok/s eta 76s (last 100 steps)\n"
    assert capsys.readouterr().out == want


def test_the_time_left_of_a_campaign_follows_from_the_rate_of_a_running_trial(trial):
    found = _display.estimate(trial.campaign, Journal.of(trial.campaign).replay())
    assert found["left_s"] == pytest.approx((5000 - 1200) / 50)
    assert found["basis"] == "1 running by their rate, 0 to run by the mean of 1 running, 1 at once"


def test_plain_lines_come_every_30_seconds(trial, capsys):
    shown = screen(trial)
    shown.tick([trial])
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_bars_that_are_drawn_over(trial, capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    shown = screen(trial, tty=True)
    shown._due = 0.0
    shown.tick([trial])
    assert "[####                ] step 1200/5000" in capsys.readouterr().out
    shown.say("text")
    assert capsys.readouterr().out == "\x1b[1A\x1b[Jtext\n"


@pytest.mark.parametrize(("variable", "colored"), [(None, True), ("1", False)])
def test_no_color_is_obeyed(trial, monkeypatch, variable, colored):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if variable:
        monkeypatch.setenv("NO_COLOR", variable)
    assert ("\x1b" in screen(trial, tty=True).paint("done", 32)) == colored


def test_details_need_v1(trial, capsys):
    screen(trial).detail("pid 1")
    screen(trial, verbose=True).detail("pid 2")
    assert capsys.readouterr().out == "pid 2\n"


def test_a_trial_that_starts_says_so(trial):
    trial.write("lease", {**trial.lease(), "lease": 2})
    assert _display.progress(trial)["text"] == "starting"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (89, "89s"), (754, "13m"), (7300, "2h"), (400000, "5d")])
def test_durations_are_short(seconds, text):
    assert _display.duration(seconds) == text
