# SPDX-License-Identifier: MIT
"""BASELINE= takes over trials that are comparable, seed by seed, and starts nothing when a field differs."""

import json

import pytest

from ablab import configure, kconf, machine, plan, provenance, run
from ablab.journal import Journal
from ablab.rundir import Campaign, RunError, campaigns
from tests.run import drive
from tests.verify import fair


def planned(**variables):
    layers = configure.layers(kconf.ROOT, "tiny")
    return plan.expand(layers, {"SEEDS": "2", **variables}, machine.inventory(), name="tiny")


def options(tmp_path, **changes):
    return drive.options(**{"results": tmp_path, "checker": "tests.run.targets:passes", **changes})


@pytest.fixture
def old(tmp_path):
    """A finished campaign whose trials ran as this machine runs them now."""
    assert run.start(planned(), options(tmp_path, name="old")) == 0
    found = Campaign.open(tmp_path / "old")
    source = provenance.ROOT / "ablab/train.py"
    for trial in found.trials():
        values = kconf.settle(kconf.load(), [kconf.lex(trial.config)])
        facts = {
            "config": {n: {"value": v, "text": values.text[n], "origin": ""} for n, v in values.values.items()},
            "software": provenance.software(),
            "cpu": {"model": machine.inventory().cpu, "cores": [0]},
            "data": {"name": "none", "sha256": "0" * 64, "split": "0" * 64, "order_seed": 1},
            "code": {**provenance.code(), "modules": {"ablab.train": fair.rundir.stamp(source)["sha256"]}},
        }
        for key, value in facts.items():
            fair.put(trial, f"manifest.{key}", value)
        fair.stamp(trial)
    return found


def test_equal_trials_are_reused_and_missing_seeds_run(old, tmp_path, capsys):
    assert run.start(planned(SEEDS="3", BASELINE="old"), options(tmp_path, name="new")) == 0
    new = Campaign.open(tmp_path / "new")
    assert drive.states(new) == ["done"] * 3 and [t.flaw() for t in new.trials()] == [None] * 3
    reasons = [Journal.of(new).replay().entry(t.name).reason for t in new.trials()]
    assert reasons == ["reused from old", "reused from old", "done"]
    for mine, theirs in zip(new.trials(), old.trials(), strict=False):
        assert mine.file("summary").read_bytes() == theirs.file("summary").read_bytes()
        assert mine.record["reused"] == {"campaign": "old", "sha256": old.hash, "trial": theirs.name}
    assert "reused" not in new.trials()[2].record
    text = capsys.readouterr().out
    assert "is old/base-s1337" in text and "base-s1339 runs, its seed is not there" in text


def test_a_trial_of_the_other_campaign_can_be_named(old, tmp_path):
    assert run.start(planned(BASELINE="old/base-s1338"), options(tmp_path, name="new")) == 0
    new = Campaign.open(tmp_path / "new")
    assert [("reused" in t.record) for t in new.trials()] == [False, True]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("software.torch", "1.0"),
        ("software.lock", "f" * 64),
        ("cpu.model", "Other CPU"),
        ("data.sha256", "f" * 64),
        ("code.modules", {"ablab.train": "f" * 64}),
        ("config.OPT_LR.text", '"1e-2"'),
    ],
)
def test_a_difference_exits_3_with_the_field_and_starts_nothing(old, tmp_path, capsys, field, value):
    fair.change(old, lambda t: fair.put(t, f"manifest.{field}", value), None)
    assert run.start(planned(BASELINE="old"), options(tmp_path, name="new")) == 3
    named = {"cpu.model": "hardware.cpu", "config.OPT_LR.text": "treatment.CONFIG_OPT_LR"}.get(field, field)
    out = capsys.readouterr().out
    assert f"not comparable: {named}: " in out and out.splitlines()[-1] == "RESULT: exit=3"
    assert [c.name for c in campaigns(tmp_path)] == ["old"]


def test_another_configuration_exits_3(old, tmp_path, capsys):
    assert run.start(planned(BASELINE="old", CONFIG_OPT_LR="1e-2"), options(tmp_path)) == 3
    assert 'treatment.CONFIG_OPT_LR: "3e-3" there, "1e-2" here' in capsys.readouterr().out


def test_a_damaged_trial_is_not_reused(old, tmp_path, capsys):
    fair.put(old.trials()[0], "summary.stop", "early")  # DONE does not vouch for it
    assert run.start(planned(BASELINE="old"), options(tmp_path)) == 3
    assert "integrity.done" in capsys.readouterr().out


@pytest.mark.parametrize("address", ["wandb:me/project/run", "trackio:project/run"])
def test_a_run_of_a_service_is_never_comparable(tmp_path, address):
    with pytest.raises(RunError, match="no manifest of ours"):
        run.start(planned(BASELINE=address), options(tmp_path))


def test_the_plan_says_what_is_reused(old, tmp_path):
    reuse = run.reused(planned(BASELINE="old"), options(tmp_path))
    assert len(reuse.lines()) == 2 and reuse.differences == ()
    assert run.reused(planned(), options(tmp_path)) is run.NOTHING


def test_a_reused_trial_is_named_in_the_frozen_plan(old, tmp_path):
    run.start(planned(BASELINE="old"), options(tmp_path, name="new"))
    content = json.loads((tmp_path / "new/campaign.json").read_text())
    assert all(t["reused"]["campaign"] == "old" for t in content["trials"])
