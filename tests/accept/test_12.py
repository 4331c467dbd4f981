# SPDX-License-Identifier: MIT
"""A hostile name is refused at creation; forced into an old folder it stays under the root, inert."""

import json
from pathlib import Path

import pytest

from ablab import journal
from ablab.rundir import Campaign, RunError, campaigns, find

HOSTILE = '../../x"><script>'
HASH = "0" * 64
PLAN = {
    "name": "demo",
    "created": "2026",
    "kind": "single",
    "plan": HASH,
    "study": None,
    "base": {"layers": [], "config": ""},
    "make_vars": {},
    "trials": [
        {
            "id": "base-s1",
            "hash": HASH,
            "group": HASH,
            "step": None,
            "title": "t",
            "axes": {},
            "seed": 1,
            "overrides": [],
            "superseded": [],
            "resources": {"gpus": 0, "cpus": 1, "mem_gib": 1.0},
        }
    ],
    "skipped": [],
    "contrasts": [],
    "registration": {},
    "auto": {},
    "policy": {"keep_going": True, "retries": {}, "grace_s": 120, "hang_s": 600},
    "code": {"commit": None, "dirty": True, "patch": None, "tree": HASH},
    "data": {"name": "synth", "sha256": HASH, "tokens": None},
    "check": {"verdict": "passed", "sha256": None},
    "executor": "local",
}


def everything(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_a_hostile_campaign_name_is_refused_at_creation(tmp_path):
    results = tmp_path / "a" / "b"
    results.mkdir(parents=True)
    before = everything(tmp_path)
    with pytest.raises(RunError, match="choose another one"):
        Campaign.create(results, HOSTILE, PLAN)
    assert everything(tmp_path) == before


def test_a_hostile_trial_id_is_refused_at_creation(tmp_path):
    trials = [{**PLAN["trials"][0], "id": HOSTILE}]
    with pytest.raises(RunError, match="choose another one"):
        Campaign.create(tmp_path / "results", "demo", {**PLAN, "trials": trials})
    assert everything(tmp_path) == set()


def test_forced_into_an_old_folder_it_opens_nothing_outside(tmp_path):
    results = tmp_path / "a" / "b"
    made = Campaign.create(results, "demo", PLAN)
    good = Campaign.create(results, "good", PLAN)
    body = json.loads(made.file("campaign").read_text())
    body["trials"][0]["id"] = HOSTILE
    made.file("campaign").write_text(json.dumps(body))
    (results / 'x"><script>').mkdir()
    before = everything(tmp_path)
    with pytest.raises(RunError, match="not a name"):
        Campaign.open(made.path)
    for name in (HOSTILE, 'x"><script>', ".."):
        with pytest.raises(RunError):
            find(results, name)
        with pytest.raises(RunError):
            good.trial(name)
    assert [c.name for c in campaigns(results)] == ["good"]
    assert everything(tmp_path) == before


def test_forced_into_the_journal_it_is_only_a_key(tmp_path):
    made = Campaign.create(tmp_path, "demo", PLAN)
    log = journal.Journal.of(made)
    log.claim(made.trials()[0])
    line = {
        "seq": 9,
        "wall": 0.0,
        "trial": HOSTILE,
        "attempt": 1,
        "lease": 7,
        "from": "queued",
        "to": "running",
    }
    with made.journal.open("a") as file:
        file.write(json.dumps({**line, "reason": "forced", "host": "h", "pid": 1}) + "\n")
    before = everything(tmp_path)
    assert HOSTILE in journal.Journal.of(made).replay()
    with pytest.raises(RunError):
        made.trial(HOSTILE)
    assert everything(tmp_path) == before
