# SPDX-License-Identifier: MIT
"""The index says what the rows say, whatever happened to the files or to the index."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from ablab import metrics, rundir
from ablab.report import index, load
from ablab.rundir import Rows
from tests.report import campaign

OLD = 10**18  # nanoseconds: long at rest


@pytest.fixture
def trial(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "SETTLED_NS", 0)  # no test waits for the clock of the file system
    arms = (("R0", {}),)
    return campaign.write(tmp_path, lambda arm, seed: 2.0, arms=arms, seeds=(1,), contrasts=()).trials()[0]


def wanted(trial):
    """What rundir.rows says, by name: [(step, value)]."""
    found = {}
    for row in rundir.rows(trial):
        for name, value in row["m"].items():
            found.setdefault(name, []).append((row["step"], value))
    return found


def got(trial):
    columns = index.columns(trial)
    steps = columns.axis("step")
    pairs = {}
    for name in columns.spans:
        at, values = columns.get(name)
        cells = [None if v != v else v for v in values.tolist()]
        pairs[name] = list(zip(steps[at].tolist(), cells, strict=True))
    return pairs


def entry(trial, kind="columns"):
    return trial.campaign.index / f"{trial.name}.{kind}"


def at_rest(trial):
    """As if the files had been written long ago; the change time alone cannot be put back."""
    for path in trial.path.rglob("*"):
        os.utime(path, ns=(OLD, OLD))


def test_columns_are_the_rows(trial):
    assert got(trial) == wanted(trial)
    assert entry(trial).exists()
    assert got(trial) == wanted(trial)  # and from the index


def test_deleting_the_index_loses_nothing(trial):
    before = got(trial)
    entry(trial).unlink()
    assert got(trial) == before


@pytest.mark.parametrize("size", ["grown", "same size, same modification time"])
def test_an_edited_file_is_read_again(trial, size):
    path = trial.attempt(1).metrics
    got(trial)
    stat, text = path.stat(), path.read_text()
    if size == "grown":
        Rows(path, "metrics", {"trial": trial.name, "attempt": 1, "resumed_at_step": 0}).row(
            999, {"val_loss": 1.0}, tokens=1, train_s=1.0, wall_s=1.0, flops=1.0
        )
    else:
        path.write_text(text.replace('"val_loss":2.0', '"val_loss":1.0'))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert path.stat().st_size == stat.st_size and path.stat().st_mtime_ns == stat.st_mtime_ns
    assert got(trial)["val_loss"][-1][1] == 1.0
    assert got(trial) == wanted(trial)


@pytest.mark.parametrize("damage", ["torn", "header", "payload", "empty", "zeros", "link"])
def test_a_damaged_index_is_made_again(trial, damage):
    before = got(trial)
    path = entry(trial)
    data = path.read_bytes()
    changed = {
        "torn": data[:-9],
        "header": data.replace(b'"val_loss"', b'"val_los2"', 1),
        "payload": data[:-1] + bytes([data[-1] ^ 1]),
        "empty": b"",
        "zeros": bytes(len(data)),
        "link": data,
    }[damage]
    path.unlink()
    if damage == "link":
        path.with_name("elsewhere").write_bytes(changed)
        path.symlink_to(path.with_name("elsewhere"))
    else:
        path.write_bytes(changed)
    assert got(trial) == before


def test_an_index_that_changes_while_it_is_open_is_seen(trial):
    before = got(trial)
    columns = index.columns(trial)
    entry(trial).write_bytes(b"")
    assert columns.get("val_loss")[1].tolist() == [v for _, v in before["val_loss"]]


def test_what_was_written_a_moment_ago_is_not_kept(trial, monkeypatch):
    monkeypatch.setattr(index, "SETTLED_NS", 3600 * 10**9)
    assert got(trial) == wanted(trial)
    assert index.flaw(trial) is None
    assert not list(trial.campaign.index.iterdir())


def test_a_folder_that_cannot_be_written_has_no_index(trial):
    trial.campaign.index.parent.write_text("in the way")
    assert got(trial) == wanted(trial)
    assert index.flaw(trial) is None


@pytest.mark.parametrize(
    "line",
    [
        b'{"step":7,"m":{"val_loss":3.0',
        b"nonsense\n",
        b'{"step":220,"m":{"val_loss":"=1+1","train_loss":true}}\n',
        b'{"step":220,"m":{"val_loss":null,"train_loss":2}}\n',
        b'{"step":220,"m":{"val_loss":' + b"9" * 400 + b"}}\n",
        b'{"step":"x","m":{}}\n',
        b'{"step":220,"m":[]}\n',
        b"[1]\n",
        b'{"step":220,"m":{}},{"step":230,"m":{}}\n',
    ],
)
def test_bad_lines_and_values_are_left_out(trial, line):
    sound = got(trial)
    with open(trial.attempt(1).metrics, "ab") as file:
        file.write(line)
    columns, found = index.columns(trial), got(trial)
    for name, points in found.items():
        assert points[: len(sound[name])] == sound[name]
        assert all(v is None or type(v) in (int, float) for _, v in points)
    if b"null" in line:
        assert found["val_loss"][-1] == (220, None) and found["train_loss"][-1] == (220, 2)
    else:
        assert found == sound
        assert bool(columns.damage) == line.endswith(b"\n")


def test_attempts_are_merged_as_rundir_merges_them(trial):
    attempt = trial.new_attempt(2)
    rows = Rows(attempt.metrics, "metrics", {"trial": trial.name, "attempt": 2, "resumed_at_step": 100})
    for step in (100, 120, 140):
        axes = {"tokens": step, "train_s": 1.0 * step, "wall_s": 1.0 * step, "flops": 1.0 * step}
        rows.row(step, {"val_loss": -float(step), "grad_norm": 1.0}, **axes)
    rows.close()
    assert got(trial) == wanted(trial)
    assert got(trial)["val_loss"][-1] == (140, -140.0)


@pytest.mark.parametrize("names", [["val_loss"], ["grad_norm"], ["val_loss", "grad_norm", "train_loss"], ["sparsity"]])
def test_rows_of_some_metrics_are_those_of_the_files(trial, names):
    rows = Rows(trial.new_attempt(2).metrics, "metrics", {"trial": trial.name, "attempt": 2, "resumed_at_step": 180})
    axes = {"tokens": 1, "train_s": 1.5, "wall_s": 2.5, "flops": 3.0}
    rows.row(200, {"grad_norm": float("nan"), "train_loss": 1.0}, **axes)
    rows.row(210, {"val_loss": 1.0}, **axes)
    rows.close()
    for _ in range(2):
        found = load.read(trial.campaign.path).trials[0].rows(*names)
        wanted = [{**r, "bad": [n for n in r["bad"] if n in names]} for r in rundir.rows(trial, names)]
        assert found == wanted and all(type(r["step"]) is int for r in found)


def test_integers_stay_exact(trial):
    big = 2**53 + 1
    columns = index.pack([{**dict.fromkeys(metrics.AXES, big), "step": 1, "m": {"tokens_seen": big}}])
    assert columns.axis("tokens").tolist() == [big] and columns.get("tokens_seen")[1].tolist() == [big]


def test_many_trials_are_indexed_by_several_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "SETTLED_NS", 0)
    monkeypatch.setattr(index, "FEW", 2)
    made = campaign.write(tmp_path, lambda arm, seed: 2.0 + seed)
    trials = made.trials()
    index.prepare(trials)
    assert len(list(made.index.glob("*.columns"))) == len(trials)
    assert [got(t) for t in trials] == [wanted(t) for t in trials]


def test_done_is_hashed_once_and_again_after_any_change(trial, monkeypatch):
    hashed = []
    monkeypatch.setattr(rundir, "stamp", lambda path, real=rundir.stamp: hashed.append(path) or real(path))
    assert index.flaw(trial) is None and hashed
    hashed.clear()
    assert index.flaw(trial) is None and not hashed
    assert load.read(trial.campaign.path, rehash=True).trials[0].is_done and hashed


@pytest.mark.parametrize("name", ["config", "manifest.json", "summary.json", "attempts/1/metrics.jsonl"])
def test_an_edit_that_puts_size_and_time_back_is_found(trial, name):
    assert index.flaw(trial) is None
    path = trial.path / name
    stat, data = path.stat(), path.read_bytes()
    path.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert "not what was vouched for" in index.flaw(trial)
    assert load.read(trial.campaign.path).trials[0].state == load.DAMAGED


@pytest.mark.parametrize("what", ["done", "lease", "plan"])
def test_marks_that_change_are_verified_again(trial, what):
    assert index.flaw(trial) is None
    if what == "done":
        trial.file("done").unlink()
    elif what == "lease":
        trial.write("lease", {**trial.lease(), "lease": 99})
    else:
        place = trial.campaign.file("campaign")
        place.write_text(place.read_text().replace('"R0"', '"R1"'))
        trial = rundir.Campaign.open(trial.campaign.path).trial(trial.name)
    assert index.flaw(trial)


def test_a_forged_mark_of_another_trial_does_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "SETTLED_NS", 0)
    made = campaign.write(tmp_path, lambda arm, seed: 2.0, arms=(("R0", {}),), seeds=(1, 2), fates={"r0-s2": "failed"})
    done, failed = made.trials()
    assert index.flaw(done) is None
    entry(failed, "verified").write_bytes(entry(done, "verified").read_bytes())
    assert "not finished" in index.flaw(failed)


def test_reading_the_index_does_not_decode_rows(trial):
    got(trial)
    text = trial.attempt(1).metrics
    code = (
        "import sys; from pathlib import Path; from ablab import rundir; from ablab.report import index;"
        "rundir.rows = rundir.lines = None; t = rundir.Campaign.open(Path(sys.argv[1])).trials()[0];"
        "print(index.columns(t).get('val_loss')[1].tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(trial.campaign.path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [v for _, v in wanted(trial)["val_loss"]] and text.exists()


def test_mean_is_weighted_by_training_time():
    class Two(load.Curves):
        # 1 s at 10, then 9 s at 20
        columns = index.pack(
            [
                {"step": 1, "train_s": 1.0, "m": {"train/tok_per_sec": 10.0}},
                {"step": 2, "train_s": 10.0, "m": {"train/tok_per_sec": 20.0}},
            ]
        )

    assert Two().over("train/tok_per_sec", "mean") == pytest.approx(19.0)
    assert Two().over("train/tok_per_sec", "final") == 20.0
    assert Two().over("val_loss", "mean") is None
    assert np.isfinite(Two().curve("train/tok_per_sec", "train_s")[0]).all()
