# SPDX-License-Identifier: MIT
"""Acceptance 9: without network and tracker all works, a later sync delivers each point once, faults cost nothing."""

import importlib
import json
import socket
import sqlite3
import sys

import pytest

from ablab import configure, kconf, machine, plan, report, run, rundir
from ablab.run import mirror
from ablab.rundir import campaigns
from ablab.track import _feed
from tests import trial as tiny
from tests.accept import faults

TRACKERS = ("wandb", "trackio", "tensorboard")


def planned(folder, **more):
    variables = {
        "SEEDS": "2",
        "JOBS": "2",
        "MAX_ITERS": "20",
        "CONFIG_EVAL_INTERVAL": "4",
        "CONFIG_DATA_SHAKESPEARE": "y",
        "CONFIG_TRAIN_BATCH_EFFECTIVE": "4",
        "CONFIG_DATA_DIR": str(folder / "data"),
        **more,
    }
    return plan.expand(configure.layers(kconf.ROOT, "tiny"), variables, machine.inventory(), name="tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("accept")


@pytest.fixture(scope="module")
def alone(folder):
    """(campaign, exit code, path of its report): made without network and without a tracker."""
    made = []
    places = {"target": "tests.accept.faults:offline", "checker": "tests.accept.faults:offline_check"}
    options = run.Options(yes=True, results=folder / "results", report=lambda c: made.append(report.build(c)), **places)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded(socket.socket.connect))
        for name in TRACKERS:
            patch.setitem(sys.modules, name, None)  # an import of it fails
        code = run.start(planned(folder, TRACKER="none"), options)
    (campaign,) = campaigns(folder / "results")
    return campaign, code, made[0]


def test_a_campaign_runs_without_network_and_tracker(alone):
    campaign, code, page = alone
    assert code == 0 and [t.flaw() for t in campaign.trials()] == [None, None]
    assert page.exists() and campaign.status()["result"].startswith("RESULT: exit=0 done=2 ")
    assert not list(campaign.mirror.iterdir())


def test_a_later_sync_delivers_every_point_once(alone, monkeypatch):
    campaign, _, _ = alone
    monkeypatch.setenv("TRACKIO_DIR", str(campaign.path.parent / "trackio"))
    names = ("trackio", "wandb:offline", "tensorboard")
    for _ in range(2):  # the second has nothing to do
        assert mirror.sync(campaign, names) == 0
    for trial in campaign.trials():
        with sqlite3.connect(campaign.path.parent / "trackio/ablab.db") as store:
            query = "select step, metrics from metrics where run_name like ? order by id"
            found = store.execute(query, (f"{trial.record['id']}-%",)).fetchall()
        wanted = list(rundir.rows(trial))
        assert [step for step, _ in found] == [r["step"] for r in wanted]
        for (_, text), row in zip(found, wanted, strict=True):
            assert row["m"].items() <= json.loads(text).items()
    left = [(s["state"], s["left"], s["sent"]) for s in (files.state() for files in campaign.mirrors())]
    count = sum(len(list(rundir.rows(t))) for t in campaign.trials())
    assert left == [("synced", 0, count)] * 3


def test_trackers_that_fail_change_nothing_but_clocks(alone, folder, capfd):
    trackers = ("raises", "sleeps", "dies", "busy", "full", "never")
    options = run.Options(
        yes=True, results=folder / "mirrored", trackers=trackers, mirror="tests.track.faults", check=False
    )
    assert run.start(planned(folder, CONFIG_TRACK_DEADLINE_S="8"), options) == 0
    out = capfd.readouterr().out
    assert out.splitlines()[-1].startswith("RESULT: exit=0 done=2 ") and "warning: never: behind, " in out
    (campaign,) = campaigns(folder / "mirrored")
    for mine, plain in zip(campaign.trials(), alone[0].trials(), strict=True):
        assert tiny.outcome(mine) == tiny.outcome(plain)
        assert mine.record["hash"] == plain.record["hash"]


@pytest.mark.slow
def test_mirrors_of_trials_that_are_killed_hold_each_point_once(folder, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(folder / "killed/trackio"))
    options = run.Options(yes=True, results=folder / "killed", target="tests.accept.faults:killed", check=False)
    todo = planned(folder, TRACKER="trackio,wandb:offline", MAX_ITERS="60", CONFIG_TRAIN_CKPT_INTERVAL="20")
    assert run.start(todo, options) == 0
    (campaign,) = campaigns(folder / "killed")
    for trial in campaign.trials():
        assert len(trial.attempts()) == 2
        wanted = [(r["step"], untimed(r["m"])) for r in rundir.rows(trial)]
        with sqlite3.connect(folder / "killed/trackio/ablab.db") as store:
            query = "select step, metrics from metrics where run_name like ? order by id"
            found = store.execute(query, (f"{trial.record['id']}-%",)).fetchall()
        names = {n for _, m in wanted for n in m}
        assert [(s, {n: v for n, v in json.loads(m).items() if n in names}) for s, m in found] == wanted
        paths = sorted(p for p in campaign.mirror.glob("*/wandb/offline-run-*/run-*.wandb") if of(p, trial))
        rows = [r for path in paths for _, r in wandb_history(path)]  # a run is closed and opened again
        found = [(r["step"], {n: v for n, v in r.items() if n in names}) for r in rows]
        assert found == wanted


def untimed(m):
    return {n: v for n, v in m.items() if not tiny.TIMES.match(n)}


def wandb_history(path):
    return importlib.import_module("ablab.track.wandb").history(path)


def of(path, trial):
    files = rundir.Mirror(trial.campaign, "wandb-offline")
    return path.stem.removeprefix("run-") == _feed.run_of(trial, files, 1, "open").id


def test_the_cut_network_is_noticed():
    before = socket.socket.connect, socket.socket.connect_ex
    try:
        faults.cut_network()
        with socket.socket() as plug, pytest.raises(AssertionError, match="a connection to"):
            plug.connect(("127.0.0.1", 9))
    finally:
        socket.socket.connect, socket.socket.connect_ex = before


def guarded(connect):
    """Sockets of this machine, which the server of the children uses, and no others."""

    def only_local(self, address):
        assert self.family == socket.AF_UNIX, f"a connection to {address}"
        return connect(self, address)

    return only_local
