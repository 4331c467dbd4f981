# SPDX-License-Identifier: MIT
"""Trackers are read back from their own files, in a process of their own, and held against metrics.jsonl."""

import json
import shutil

import pytest

from ablab.journal import TrialState
from ablab.report import load
from ablab.run import mirror
from ablab.rundir import Mirror
from ablab.verify import _trackers
from tests.track import rows

SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("trackio", "wandb:offline")]


@pytest.mark.parametrize("name", ["tensorboard", *SLOW])
def test_a_tracker_is_read_back_point_by_point(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trial = rows.campaign(tmp_path)
    rows.attempt(trial, 0, 20, TrialState.FAILED)
    assert mirror.sync(trial.campaign, [name]) == 0
    done = {"trial": "0" * 64, "attempt": 1, "lease": 1, "campaign": "0" * 64, "files": {}}
    trial.write("done", done)
    c = load.read(trial.campaign)
    assert _trackers.used(c, c.trials) == [name]
    told, wrong = _trackers.read(c, name, c.trials)
    assert wrong == [] and told["project"] == "ablab" and list(told["runs"]) == ["base-s1337"]

    path = trial.attempt(1).metrics
    head, *lines = path.read_text().splitlines()
    found = [json.loads(line) for line in lines]
    found[4]["m"]["learning_rate"] = 0.5
    more = {**found[-1], "q": 99, "step": 21, "m": {"train_loss": 1.0, "learning_rate": 1.0}}
    path.write_text("\n".join([head, *map(json.dumps, [*found[:-1], more])]) + "\n")
    _, wrong = _trackers.read(c, name, c.trials)
    assert all(w.startswith(f"{name}: base-s1337: ") for w in wrong)
    assert any(": 2 of" in w and "not delivered, the first train_loss at step 21" in w for w in wrong)
    assert any(": 1 of" in w and "differ, the first learning_rate at step 4" in w for w in wrong)
    assert any("of no row here" in w for w in wrong)

    for place in (Mirror(trial.campaign, name.replace(":", "-")).data, tmp_path / "trackio"):
        shutil.rmtree(place, ignore_errors=True)
    _, wrong = _trackers.read(c, name, c.trials)
    assert len(wrong) == 1 and "no " in wrong[0]


def test_a_tracker_that_is_not_known_is_told(tmp_path):
    c = load.read(rows.campaign(tmp_path).campaign)
    assert _trackers.read(c, "paper", c.trials)[1][0].startswith("paper: ")
