# SPDX-License-Identifier: MIT
"""Acceptance 3: 12 trials, one NaN, one OOM, one raising: nine done; continue starts none, rerun one."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ablab import configure, kconf, machine, plan, run
from ablab.rundir import campaigns

OPTIONS = run.Options(yes=True, target="tests.accept.faults:by_seed", checker="tests.run.targets:passes", jobs=2)


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    """The campaign after its first run, whose exit code is `campaign.code`."""
    results = tmp_path_factory.mktemp("results")
    variables = {"SEEDS": "12", "CONFIG_TRAIN_SEED": "1", "CONFIG_DATA_DIR": str(results / "data")}
    variables |= {"MAX_ITERS": "20", "CONFIG_EVAL_INTERVAL": "4", "JOBS": "2"}
    todo = plan.expand(configure.layers(kconf.ROOT, "tiny"), variables, machine.inventory(), name="tiny")
    assert len(todo.trials) == 12
    code = run.start(todo, replace(OPTIONS, results=results))
    (found,) = campaigns(results)
    found.code = code
    return found


def starts(campaign) -> list[str]:
    """Ids of the trials in the order in which they were started."""
    lines = [json.loads(line) for line in campaign.journal.read_text().splitlines()[1:]]
    return [campaign.records()[r["trial"]]["id"] for r in lines if r.get("to") == "running"]


def test_nine_are_done_and_the_exit_code_is_1(campaign, capsys):
    assert campaign.code == 1
    states = {t["trial"]: t["state"] for t in run.status(campaign)["trials"]}
    bad = {"base-s2": "diverged", "base-s5": "oom", "base-s8": "failed"}
    assert states == {f"base-s{n}": bad.get(f"base-s{n}", "done") for n in range(1, 13)}
    assert campaign.status()["exit"] == 1
    assert campaign.status()["result"].startswith("RESULT: exit=1 done=9 failed=1 diverged=1 oom=1 ")


def test_each_failure_has_its_class_and_evidence(campaign):
    found = {t["trial"]: t for t in run.status(campaign)["trials"] if t["state"] != "done"}
    assert {n: t["class"] for n, t in found.items()} == {
        "base-s2": "diverged",
        "base-s5": "oom",
        "base-s8": "exception",
    }
    ends = {n: json.loads(Path(campaign.path, t["evidence"]).read_text()) for n, t in found.items()}
    assert ends["base-s2"]["step"] == 13 and "last finite 12" in ends["base-s2"]["message"]
    assert "CONFIG_TRAIN_BATCH_MICRO=" in ends["base-s5"]["message"]
    assert "planted" in ends["base-s8"]["traceback"]


def test_continue_starts_none_and_rerun_of_failed_one(campaign, capsys):
    assert sorted(starts(campaign)) == sorted(f"base-s{n}" for n in range(1, 13))
    assert run.resume(campaign, OPTIONS) == 1
    assert len(starts(campaign)) == 12
    assert "nothing to do" in capsys.readouterr().out
    assert run.rerun(campaign, None, "failed", OPTIONS) == 1
    assert starts(campaign)[12:] == ["base-s8"]
    assert capsys.readouterr().out.splitlines()[-1].startswith("RESULT: exit=1 done=9 failed=1 ")
