# SPDX-License-Identifier: MIT
"""Trackio, W&B and TensorBoard themselves, with their own files: what they hold is what metrics.jsonl says."""

import json
import math
import os
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from ablab import kconf
from ablab.journal import TrialState
from ablab.run import mirror
from ablab.rundir import Imported, Mirror
from ablab.track import _feed, _mirror
from tests.track import rows, wandbserver
from tests.track.test_mirror import until

NAMES = ("trackio", "wandb:offline", "tensorboard")


def files_of(trial, name):
    return Mirror(trial.campaign, name.replace(":", "-"))


def kill_all(process):
    """The mirror, its workers, and what their packages started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid, signal.SIGKILL)
    for pid in map(int, children):
        os.killpg(pid, signal.SIGKILL)
    process.wait()


def trackio_rows(folder):
    """By its SQLite file alone."""
    with sqlite3.connect(folder / "ablab.db") as store:
        found = store.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert len({name for name, _, _ in found}) == 1
    return found[0][0], [{"step": step, **json.loads(metrics)} for _, step, metrics in found]


def wandb_rows(trial):
    from ablab.track.wandb import history

    paths = sorted(files_of(trial, "wandb:offline").data.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(paths) == 2  # one before the kill, one after
    return paths, [row for path in paths for _, row in history(path)]


def tensorboard_rows(trial):
    """By TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    (path,) = files_of(trial, "tensorboard").data.glob("*/events.out.tfevents.*")
    events = [e for e in LegacyEventFileLoader(str(path)).Load() if e.step]
    return path, [{"step": e.step, **{v.tag: v.simple_value for v in e.summary.value}} for e in events]


def float32(points):
    narrow = lambda v: None if v is None else struct.unpack("f", struct.pack("f", v))[0]
    return [(step, {n: narrow(v) for n, v in m.items()}) for step, m in points]


def test_all_three_hold_each_row_once_after_the_mirror_and_the_trial_were_killed(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("TRACKIO_SPACE_ID", "nobody/nothing")
    trial = rows.campaign(tmp_path)
    rows.attempt(trial, 0, 120, TrialState.DEAD)
    command = [sys.executable, "-m", "ablab.track", "follow", str(trial.campaign.path), *NAMES]
    process = subprocess.Popen(
        command, cwd=kconf.ROOT, env=mirror.environment(os.environ), stdin=subprocess.PIPE, start_new_session=True
    )
    until(lambda: all(_feed.Cursor(files_of(trial, n)).total() for n in NAMES))
    kill_all(process)
    process.stdin.close()
    for name in NAMES[:2]:  # as if they had died before they could note what they had sent
        cursor = files_of(trial, name).cursor
        cursor.write_bytes(b"".join(cursor.read_bytes().splitlines(keepends=True)[:-1]))
    rows.attempt(trial, 100, 400, TrialState.FAILED)
    assert mirror.sync(trial.campaign, NAMES) == 0
    truth = rows.truth(trial)
    assert [m for step, m in truth if step == 3] == [{"train_loss": None, "learning_rate": None}]

    name, found = trackio_rows(tmp_path / "trackio")
    run = _feed.run_of(trial, files_of(trial, "trackio"), 1, "open")
    assert rows.points(found) == truth and name == f"base-s1337-{run.id}"
    assert [r["iteration"] for r in found] == [step for step, _ in truth]
    with sqlite3.connect(tmp_path / "trackio/ablab.db") as store:
        (config,) = store.execute("select config from configs").fetchone()
        assert store.execute("select count(*) from system_metrics").fetchone() == (0,)  # its own GPU and CPU logging
    assert json.loads(config)["_Username"] is None and str(tmp_path).encode() not in config

    paths, found = wandb_rows(trial)
    assert rows.points(found) == truth
    assert [r["_step"] for r in found] == list(range(len(truth)))
    assert all(r["tokens"] == 10 * r["step"] and r["wall_s"] == 0.7 * r["step"] for r in found)
    data = b"".join(path.read_bytes() for path in paths)
    assert len(data) > 3 * 32768  # rows lie across blocks of the format
    host = socket.gethostname().encode()
    assert str(tmp_path).encode() not in data and (len(host) < 4 or host not in data)

    path, found = tensorboard_rows(trial)
    assert rows.points(found) == float32(truth)
    assert math.isnan(next(r for r in found if r["step"] == 3)["train_loss"])
    before = path.read_bytes()
    files_of(trial, "tensorboard").cursor.unlink()
    assert mirror.sync(trial.campaign, ["tensorboard"]) == 0
    assert path.read_bytes() == before  # rebuilt, byte for byte

    assert mirror.sync(trial.campaign, NAMES[:2]) == 0  # nothing is left to send, and nothing is sent
    assert rows.points(trackio_rows(tmp_path / "trackio")[1]) == truth
    assert rows.points(wandb_rows(trial)[1]) == truth


def test_a_run_of_trackio_and_one_of_wandb_are_imported_whole(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trial = rows.campaign(tmp_path)
    rows.attempt(trial, 0, 20, TrialState.FAILED)
    assert mirror.sync(trial.campaign, NAMES[:2]) == 0
    run = _feed.run_of(trial, files_of(trial, "trackio"), 1, "open")
    (folder,) = files_of(trial, "wandb:offline").data.glob("wandb/offline-run-*")
    sources = {"one": f"trackio:ablab/base-s1337-{run.id}", "two": f"wandb:{folder}"}
    for name, source in sources.items():
        assert mirror.other("import", source, tmp_path / "results", name) == 0
        assert f"imported:{name}: 25 rows of {source}" in capfd.readouterr().out
        got = Imported(tmp_path / "results", name)
        assert [(r["step"], r["m"]) for r in got.rows()] == rows.truth(trial)
        origin = got.origin()
        assert (origin["address"], origin["rows"], origin["gaps"]) == (source, 25, [])
        assert not os.access(got.metrics, os.W_OK) or os.geteuid() == 0
        assert got.metrics.stat().st_mode & 0o222 == 0
    assert Imported(tmp_path / "results", "one").origin()["config"]["effective_batch_size"] is None
    assert mirror.other("import", sources["one"], tmp_path / "results", "one") == 2
    assert "exists; choose another name with NAME=" in capfd.readouterr().out
    assert mirror.other("import", "trackio:ablab/nothing", tmp_path / "results", "") == 2
    assert "no such run; write trackio:PROJECT/RUN; known: base-s1337" in capfd.readouterr().out


@pytest.mark.slow
def test_wandb_online_resumes_after_a_kill_and_a_busy_service(tmp_path, monkeypatch):
    trial = rows.campaign(tmp_path)
    rows.attempt(trial, 0, 40, TrialState.DEAD)
    with wandbserver.Server(refuse=3) as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        command = [sys.executable, "-m", "ablab.track", "follow", str(trial.campaign.path), "wandb"]
        process = subprocess.Popen(
            command, cwd=kconf.ROOT, env=mirror.environment(os.environ), stdin=subprocess.PIPE, start_new_session=True
        )
        until(lambda: _feed.Cursor(files_of(trial, "wandb")).total())
        kill_all(process)
        process.stdin.close()
        rows.attempt(trial, 30, 60, TrialState.DONE)
        assert mirror.sync(trial.campaign, ["wandb"]) == 0
        (run,) = server.runs.values()
        assert rows.points(run["history"]) == rows.truth(trial)
        assert (run["display"], run["state"], server.refuse) == ("base-s1337", "finished", 0)
        assert mirror.other("import", f"wandb:me/ablab/{next(iter(server.runs))}", tmp_path / "results", "it") == 0
        assert [(r["step"], r["m"]) for r in Imported(tmp_path / "results", "it").rows()] == rows.truth(trial)
        assert server.unknown == []
        sent = b"".join(server.seen)
        assert str(tmp_path).encode() not in sent and str(kconf.ROOT).encode() not in sent

        next(iter(server.runs.values()))["config"]["trial"] = {"value": "another"}
        files_of(trial, "wandb").cursor.write_bytes(
            files_of(trial, "wandb").cursor.read_bytes().splitlines(keepends=True)[0]
        )
        assert mirror.sync(trial.campaign, ["wandb"]) == 1  # ours is new, and somebody has it
        assert files_of(trial, "wandb").state()["state"] == "conflict"


def test_a_gap_in_the_row_numbers_is_told(tmp_path):
    from ablab.track import _import

    got = [{"_step": n, "step": n, "loss": 1.0, "text": "x", "_runtime": 3} for n in (0, 1, 4)]
    place = _import.save(tmp_path, "a", "wandb:e/p/r", {"lr": 1, "_wandb": {}}, got)
    assert place.origin()["gaps"] == ["row 2 to 3 missing"] and place.origin()["config"] == {"lr": 1}
    assert [r["m"] for r in place.rows()] == [{"loss": 1.0}] * 3


@pytest.mark.slow
def test_a_run_that_is_there_already_is_a_conflict(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trial = rows.campaign(tmp_path)
    rows.attempt(trial, 0, 8, TrialState.FAILED)
    assert mirror.sync(trial.campaign, ["trackio"]) == 0
    files_of(trial, "trackio").cursor.unlink()
    assert mirror.sync(trial.campaign, ["trackio"]) == 1
    assert "warning: trackio: conflict, 10 rows not delivered" in capfd.readouterr().out
    assert len(trackio_rows(tmp_path / "trackio")[1]) == 10
    assert mirror.sync(trial.campaign, ["trackio"], fresh=True) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_tracker_test_sends_kills_replays_and_reads_back(name, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    assert mirror.other("test", name, tmp_path, "") == 0
    assert f"{name}: 60 rows read back, 0 differ from the 60 that were written" in capfd.readouterr().out


def test_a_tracker_that_cannot_be_used_is_told_before_anything_starts(tmp_path, monkeypatch, capfd):
    for name in ("WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    config = rows.tiny.settled(tmp_path).config()
    with pytest.raises(mirror.RunError, match="TRACKER=wandb: error: nobody is logged in: run wandb login") as error:
        mirror.ensure(["tensorboard", "wandb"], config)
    assert "nothing was started; TRACKER=none runs without" in str(error.value)
    assert mirror.other("test", "wandb", tmp_path, "") == 2
    assert "wandb: nobody is logged in" in capfd.readouterr().out
    with pytest.raises(mirror.RunError, match="tracker test paper: no such tracker; trackers: tensorboard trackio"):
        mirror.other("test", "paper", tmp_path, "")


def test_a_package_that_is_missing_is_named_with_its_extra(tmp_path, monkeypatch):
    member = _mirror.made("wandb:offline", _mirror.values_of(["wandb:offline"], rows.tiny.settled(tmp_path).config()))
    monkeypatch.setattr(type(member), "package", "nothing_of_this_name")
    with pytest.raises(ValueError, match="TRACK_WANDB needs nothing_of_this_name: pip install"):
        member.ready()
    assert _mirror.plugin.extra_of("wandb") == "wandb" and _mirror.plugin.extra_of("trackio") == "trackio"
