# SPDX-License-Identifier: MIT
"""The mirror process: whatever a tracker does, each row arrives once, and nobody waits for it longer than agreed."""

import errno
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from ablab import kconf
from ablab.journal import TrialState
from ablab.run import mirror
from ablab.rundir import Mirror
from ablab.track import _feed, _mirror
from tests.track import faults, rows

FAULTS = ("raises", "sleeps", "dies", "busy", "full")
MODULE = "tests.track.faults"


def start(trial, verb, *names, **streams):
    command = [sys.executable, "-m", MODULE, verb, str(trial.campaign.path), *names]
    return subprocess.Popen(command, cwd=kconf.ROOT, start_new_session=True, **streams)


def stored(trial, name):
    files = Mirror(trial.campaign, name)
    run = _feed.run_of(trial, files, _feed.Cursor(files).copy, "open")
    return faults.Service.fetch(None, faults.Service.address(None, run))[1]


def until(condition, limit_s=120):
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@pytest.fixture
def trial(tmp_path):
    found = rows.campaign(tmp_path)
    rows.attempt(found, 0, 9, TrialState.DEAD)
    rows.attempt(found, 5, 14, TrialState.FAILED)
    return found


def test_each_row_arrives_once_at_trackers_that_fail(trial):
    assert start(trial, "sync", *FAULTS).wait() == 0
    for name in FAULTS:
        found = stored(trial, name)
        assert rows.points(found) == rows.truth(trial), name
        assert [r["n"] for r in found] == list(range(len(found))), name
        failed = sorted(int(p.name) for p in (Mirror(trial.campaign, name).data / "failed").iterdir())
        assert failed == list(range(0, len(found), faults.EVERY)), name  # the faults did strike
        state = Mirror(trial.campaign, name).state()
        assert (state["state"], state["sent"], state["left"]) == ("synced", len(found), 0), name


def test_a_tracker_that_never_answers_is_given_up_and_can_be_synced_later(trial, capfd):
    assert mirror.sync(trial.campaign, ["never"], module=MODULE) == 1
    said = capfd.readouterr().out
    count = len(rows.truth(trial))
    assert f"warning: never: behind, {count} rows not delivered (ConnectionError: no route to the service)" in said
    assert f"ablab tracker sync {trial.campaign.name} delivers them" in said
    assert mirror.status(trial.campaign).rows == (
        ("never", "behind", 0, count, 0, "ConnectionError: no route to the service"),
    )
    assert mirror.sync(trial.campaign, ["raises"], module=MODULE) == 0
    assert "every row is delivered" in capfd.readouterr().out


def test_a_fresh_copy_goes_to_another_run(trial):
    assert mirror.sync(trial.campaign, ["busy"], module=MODULE) == 0
    first = {p.name for p in Mirror(trial.campaign, "busy").data.glob("*.jsonl")}
    assert mirror.sync(trial.campaign, ["busy"], fresh=True, module=MODULE) == 0
    (second,) = {p.name for p in Mirror(trial.campaign, "busy").data.glob("*.jsonl")} - first
    assert second.endswith("-r2.jsonl") and rows.points(stored(trial, "busy")) == rows.truth(trial)


def test_rows_flow_while_a_trial_runs_and_the_rest_at_the_end(tmp_path):
    trial = rows.campaign(tmp_path)
    rows.attempt(trial, 0, 6)
    process = start(trial, "follow", "busy", stdin=subprocess.PIPE)
    until(lambda: _feed.Cursor(Mirror(trial.campaign, "busy")).total() == len(rows.truth(trial)))
    rows.more(trial, 7, 8)
    until(lambda: _feed.Cursor(Mirror(trial.campaign, "busy")).total() == len(rows.truth(trial)))
    rows.end(trial, TrialState.FAILED)
    process.stdin.close()
    assert process.wait(20) == 0
    assert rows.points(stored(trial, "busy")) == rows.truth(trial)
    assert _feed.Cursor(Mirror(trial.campaign, "busy")).states == {trial.name: "closed"}


def test_the_end_is_not_waited_for_longer_than_the_deadline(tmp_path, capfd):
    trial = rows.campaign(tmp_path, "\nCONFIG_TRACK_DEADLINE_S=1")
    rows.attempt(trial, 0, 6, TrialState.FAILED)
    with mirror.beside(trial.campaign, ["never"], [], MODULE):
        pass
    assert "warning: never: behind, 7 rows not delivered" in capfd.readouterr().out


def test_a_mirror_without_its_runner_leaves_too(tmp_path):
    trial = rows.campaign(tmp_path, "\nCONFIG_TRACK_DEADLINE_S=1")
    rows.attempt(trial, 0, 6, TrialState.FAILED)
    assert start(trial, "follow", "never", stdin=subprocess.DEVNULL).wait(120) == 1
    assert Mirror(trial.campaign, "never").state()["left"] == 7


def test_one_more_interrupt_ends_the_wait(tmp_path, capfd):
    trial = rows.campaign(tmp_path, "\nCONFIG_TRACK_DEADLINE_S=86400")
    rows.attempt(trial, 0, 6, TrialState.FAILED)

    class Interrupts(list):
        def __len__(self):
            return int(Mirror(trial.campaign, "never").file("mirror").exists())

    with mirror.beside(trial.campaign, ["never"], Interrupts(), MODULE):
        pass
    assert "warning: never: behind, 7 rows not delivered" in capfd.readouterr().out


def test_a_mirror_that_never_began_is_told(tmp_path, capfd):
    trial = rows.campaign(tmp_path)
    with mirror.beside(trial.campaign, ["never"], [], "tests.track.rows"):
        pass
    assert "warning: never: not begun, all rows not delivered" in capfd.readouterr().out


def test_rows_of_a_child_that_outlived_the_mirror_are_delivered_by_the_next(tmp_path):
    trial = rows.campaign(tmp_path)
    rows.attempt(trial, 0, 6)
    files = Mirror(trial.campaign, "slow")
    assert start(trial, "sync", "slow").wait() == 0
    assert _feed.Cursor(files).states == {trial.name: "open"}
    rows.more(trial, 7, 12)
    rows.end(trial, TrialState.FAILED)
    assert start(trial, "sync", "slow").wait() == 0
    assert rows.points(stored(trial, "slow")) == rows.truth(trial)
    assert _feed.Cursor(files).states == {trial.name: "closed"}
    before = files.cursor.read_bytes()
    assert start(trial, "sync", "slow").wait() == 0
    assert files.cursor.read_bytes() == before  # what is closed is not read again


def test_two_mirrors_of_a_campaign_send_each_row_once(trial):
    both = [start(trial, "sync", "slow") for _ in range(2)]
    assert sorted(p.wait() for p in both) in ([0, 0], [0, _mirror.BUSY])
    assert [r["n"] for r in stored(trial, "slow")] == list(range(len(rows.truth(trial))))


def test_a_foreign_run_is_a_conflict_and_stops_that_trial_only(trial, monkeypatch):
    class Foreign(faults.Service, symbol="TRACK_FOREIGN"):
        def open(self, run):
            raise _mirror.ConflictError("somebody's")

    monkeypatch.setattr(_mirror, "LOOK_S", 0.0)
    worker = _mirror.Worker(trial.campaign, "foreign", lambda wait_s: True)
    assert worker.work() == _mirror.CONFLICT
    assert worker.files.state()["state"] == "conflict" and worker.files.state()["left"] > 0
    assert "conflict" in mirror.behind(trial.campaign, ["foreign"], 3)[0]


def test_a_mirror_that_cannot_write_its_state_goes_on_and_is_told(trial, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "no space")

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(_mirror, "tell", full)
    monkeypatch.setattr(_mirror, "FIRST_S", 0.05)
    assert _mirror.supervise(trial.campaign, ["raises"], MODULE, once=True) == 0
    signal.signal(signal.SIGTERM, before)
    assert rows.points(stored(trial, "raises")) == rows.truth(trial)
    assert "warning: the mirror ended with 1; " in mirror.behind(trial.campaign, ["raises"], 1)[0]
    assert "another process mirrors test" in mirror.behind(trial.campaign, ["raises"], _mirror.BUSY)[0]
    assert mirror.behind(trial.campaign, ["raises"], 0) == [] and mirror.BUSY == _mirror.BUSY


@pytest.mark.slow
def test_fifty_kills_leave_each_row_there_once(tmp_path):
    trial = rows.campaign(tmp_path)
    rows.attempt(trial, 0, 2000, TrialState.DEAD)
    rows.attempt(trial, 1900, 4000, TrialState.FAILED)
    dice, files, reached = random.Random(9), Mirror(trial.campaign, "slow"), [0]
    for _ in range(50):
        process = start(trial, "work", "slow", stdin=subprocess.PIPE)
        until(lambda: _feed.Cursor(files).total() > reached[-1])
        time.sleep(dice.uniform(0, 0.1))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdin.close()
        reached.append(_feed.Cursor(files).total())
    assert reached[-1] < len(rows.truth(trial))  # all of them struck while rows were on their way
    assert start(trial, "sync", "slow").wait() == 0
    found = stored(trial, "slow")
    assert rows.points(found) == rows.truth(trial)
    assert [r["n"] for r in found] == list(range(len(found)))


def test_the_environment_of_the_mirror_is_a_list():
    given = {
        "PATH": "/bin",
        "HOME": "/home/x",
        "WANDB_API_KEY": "k",
        "HF_TOKEN": "t",
        "TRACKIO_SPACE_ID": "me/space",
        "TRACKIO_SERVER_URL": "http://x",
        "WANDB_ENTITY": "someone",
        "AWS_SECRET_ACCESS_KEY": "s",
        "CUDA_VISIBLE_DEVICES": "3",
        "https_proxy": "p",
    }
    kept = mirror.environment(given)
    assert {"PATH", "HOME", "WANDB_API_KEY", "HF_TOKEN", "https_proxy"} <= kept.keys()
    assert not {"TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "WANDB_ENTITY", "AWS_SECRET_ACCESS_KEY"} & kept.keys()
    assert kept["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(
    ("lines", "mode", "names"),
    [
        ("", "online", ()),
        ("TRACK_WANDB=y", None, ("wandb",)),
        ("TRACK_WANDB=y", "online", ("wandb",)),
        ("TRACK_WANDB=y", "offline", ("wandb:offline",)),
        ("TRACK_WANDB=y", "disabled", ()),
        ("TRACK_WANDB=y TRACK_WANDB_MODE_OFFLINE=y", "online", ("wandb:offline",)),
        ("TRACK_TRACKIO=y TRACK_WANDB=y", "disabled", ("trackio",)),
        ("TRACK_TRACKIO=y TRACK_TENSORBOARD=y", None, ("trackio", "tensorboard")),
    ],
)
def test_the_environment_makes_wandb_quieter_and_never_louder(lines, mode, names, tmp_path):
    settled = rows.tiny.settled(tmp_path, "".join(f"\nCONFIG_{line}" for line in lines.split()))
    variables = {"WANDB_MODE": mode} if mode else {}
    assert mirror.selected(settled.config(), variables) == names


def test_a_mode_on_the_command_line_binds(tmp_path):
    values = _mirror.values_of(["wandb:offline"], rows.tiny.settled(tmp_path).config())
    assert _mirror.made("wandb:offline", values).config.mode.value == "offline"
    assert _mirror.made("wandb", values).config.mode.value == "online"


def test_trackers_are_no_part_of_a_trial(tmp_path):
    plain = rows.campaign(tmp_path, name="a")
    lines = ["TRACK_WANDB=y", "TRACK_TRACKIO=y", 'TRACK_PROJECT="p"', "TRACK_DEADLINE_S=3"]
    mirrored = rows.campaign(tmp_path, "".join(f"\nCONFIG_{line}" for line in lines), "b")
    different = rows.campaign(tmp_path, '\nCONFIG_OPT_LR="1e-3"', "c")
    hashes = [t.record["hash"] for t in (plain, mirrored, different)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert 'CONFIG_TRACK_PROJECT="p"' in mirrored.config.read_text()
