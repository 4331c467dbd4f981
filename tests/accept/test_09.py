# SPDX-License-Identifier: MIT
"""Acceptance 9, first half: without network and without a tracker everything works."""

import socket
import sys

import pytest

from ablab import configure, kconf, machine, plan, report, run
from ablab.rundir import campaigns
from tests.accept import faults

TRACKERS = ("wandb", "trackio", "tensorboard")


def test_a_campaign_runs_without_network_and_tracker(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(socket.socket, "connect", guarded(socket.socket.connect))
    for name in TRACKERS:
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    variables = {
        "SEEDS": "2",
        "JOBS": "2",
        "MAX_ITERS": "20",
        "CONFIG_EVAL_INTERVAL": "4",
        "CONFIG_DATA_SHAKESPEARE": "y",
        "CONFIG_TRAIN_BATCH_EFFECTIVE": "4",
    }
    variables |= {"CONFIG_DATA_DIR": str(tmp_path / "data")}
    todo = plan.expand(configure.layers(kconf.ROOT, "tiny"), variables, machine.inventory(), name="tiny")
    places = {"target": "tests.accept.faults:offline", "checker": "tests.accept.faults:offline_check"}
    made = []
    options = run.Options(
        yes=True, results=tmp_path / "results", report=lambda c: made.append(report.build(c)), **places
    )
    assert run.start(todo, options) == 0
    (campaign,) = campaigns(tmp_path / "results")
    assert [t.flaw() for t in campaign.trials()] == [None, None]
    assert made[0].exists() and capfd.readouterr().out.splitlines()[-1].startswith("RESULT: exit=0 done=2 ")


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
