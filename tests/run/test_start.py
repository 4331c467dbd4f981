# SPDX-License-Identifier: MIT
"""From a plan to a campaign: what is asked, checked, created, continued, and what is not."""

import io
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from ablab import configure, kconf, machine, plan, run
from ablab.rundir import RunError, campaigns
from tests.run import drive


@pytest.fixture(scope="module")
def tiny():
    """Two trials of the tiny configuration."""
    layers = configure.layers(kconf.ROOT, "tiny")
    return plan.expand(layers, {"SEEDS": "2"}, machine.inventory(), name="tiny")


def options(tmp_path, **changes):
    return drive.options(**{"results": tmp_path, "checker": "tests.run.targets:passes", **changes})


def test_a_start_freezes_the_plan_and_runs_it(tiny, tmp_path, capsys):
    assert run.start(tiny, options(tmp_path)) == 0
    (campaign,) = campaigns(tmp_path)
    assert campaign.name.startswith("tiny-20") and campaign.name.endswith(f"-{tiny.hash[:6]}")
    assert [t.config.read_text() for t in campaign.trials()] == [t.config for t in tiny.trials]
    assert campaign.content["plan"] == tiny.hash and campaign.content["check"]["verdict"] == "check"
    out = capsys.readouterr().out.splitlines()
    assert "check of 2 trials" in out and out[-1].startswith("RESULT: exit=0 done=2 ")


def test_a_second_start_has_nothing_to_do(tiny, tmp_path, capsys):
    run.start(tiny, options(tmp_path))
    before = [p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()]
    capsys.readouterr()
    assert run.start(tiny, options(tmp_path)) == 0
    out = capsys.readouterr().out
    assert "nothing to do" in out and out.splitlines()[-1].startswith("RESULT: exit=0 done=2 ")
    assert [p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()] == before


def test_a_finished_campaign_keeps_its_exit_code(tiny, tmp_path):
    assert run.start(tiny, options(tmp_path, target="tests.run.targets:seven")) == 1
    assert run.start(tiny, options(tmp_path, target="tests.run.targets:seven")) == 1
    assert [drive.attempts(c) for c in campaigns(tmp_path)] == [[2, 2]]


def test_an_unfinished_campaign_is_continued(tiny, tmp_path, capsys):
    assert run.start(tiny, options(tmp_path, keep_going=False, jobs=1, target="tests.run.targets:seven")) == 1
    assert run.start(tiny, options(tmp_path)) == 1
    (campaign,) = campaigns(tmp_path)
    assert drive.states(campaign) == ["failed", "done"]
    assert f"continues {campaign.name}" in capsys.readouterr().out


def test_new_starts_another_campaign(tiny, tmp_path):
    run.start(tiny, options(tmp_path))
    run.start(tiny, options(tmp_path, new=True))
    assert [c.name.endswith(".2") for c in campaigns(tmp_path)] == [False, True]


def test_a_name_can_be_given_once(tiny, tmp_path):
    run.start(tiny, options(tmp_path, name="mine"))
    with pytest.raises(RunError, match="mine"):
        run.start(tiny, options(tmp_path, name="mine", new=True))


def test_another_name_starts_another_campaign(tiny, tmp_path):
    run.start(tiny, options(tmp_path))
    run.start(tiny, options(tmp_path, name="mine"))
    run.start(tiny, options(tmp_path, name="mine"))
    names = [c.name for c in campaigns(tmp_path)]
    assert len(names) == 2 and "mine" in names


def test_a_name_that_may_not_be_one_is_refused_first(tiny, tmp_path, capsys):
    run.start(tiny, options(tmp_path))
    capsys.readouterr()
    with pytest.raises(RunError, match="not a name"):
        run.start(tiny, options(tmp_path, name="../x"))
    assert not capsys.readouterr().out


def test_a_start_joins_the_campaign_of_a_faster_one(tiny, tmp_path, monkeypatch, capsys):
    run.start(tiny, options(tmp_path))
    find, calls = run.find_current, []
    # it saw no campaign before its dry run, and one after it
    monkeypatch.setattr(run, "find_current", lambda *a: find(*a) if calls else calls.append(a))
    assert run.start(tiny, options(tmp_path)) == 0
    (campaign,) = campaigns(tmp_path)
    assert f"continues {campaign.name}" in capsys.readouterr().out and drive.attempts(campaign) == [1, 1]


def test_other_code_starts_another_campaign(tiny, tmp_path, monkeypatch):
    run.start(tiny, options(tmp_path))
    monkeypatch.setattr(run.provenance, "tree", lambda: "0" * 64)
    assert run.find_current(tmp_path, tiny) is None


def test_a_bad_verdict_creates_nothing(tiny, tmp_path, capsys):
    assert run.start(tiny, options(tmp_path, checker="tests.run.targets:refuses")) == 1
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out.endswith("R1 build: planted\nnothing was started\nRESULT: exit=1\n")


def test_what_failed_can_be_tried_again_and_says_where_it_came_from(tmp_path, capsys):
    layers = configure.layers(kconf.ROOT, "tiny")
    bad = {"CONFIG_EVAL_KVPRUNE": "y", "CONFIG_EVAL_KVPRUNE_KEEP": "64"}
    one = plan.expand(layers, bad, machine.inventory(), name="tiny")
    assert run.start(one, options(tmp_path, checker="ablab.check:main")) == 2
    out = capsys.readouterr().out
    assert "again: make check STEP=base-s1337 CONFIG_EVAL_KVPRUNE=y CONFIG_EVAL_KVPRUNE_KEEP=64\n" in out
    assert "must be able to go; set 66 or more (" in out
    assert "(CONFIG_EVAL_KVPRUNE_KEEP from make line) (CONFIG_EVAL_KVPRUNE_RECENT from default)" in out
    assert "nothing was started" in out and not campaigns(tmp_path)


def test_a_configuration_that_does_not_bind_is_refused_without_a_dry_run_too(tmp_path, capsys):
    layers = configure.layers(kconf.ROOT, "tiny")
    one = plan.expand(layers, {"CONFIG_MODEL_GPT_HEADS": "7"}, machine.inventory(), name="tiny")
    assert run.start(one, options(tmp_path, checker="ablab.check:main", check=False)) == 2
    out = capsys.readouterr().out
    assert "base-s1337: failed in stage bind: CONFIG_MODEL_GPT_EMBED = 32 is no multiple of" in out
    assert "a head is EMBED / HEADS wide; set 4 or 8 heads (" in out
    assert "(CONFIG_MODEL_GPT_EMBED from defconfigs/tiny:8)" in out and not campaigns(tmp_path)


def test_skipping_the_check_is_recorded(tiny, tmp_path):
    run.start(tiny, options(tmp_path, check=False))
    (campaign,) = campaigns(tmp_path)
    assert campaign.content["check"]["verdict"] == "data"


def test_without_a_terminal_yes_is_needed(tiny, tmp_path):
    with pytest.raises(RunError, match="YES=1"):
        run.start(tiny, options(tmp_path, yes=False))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("answer", "starts"), [("y", True), ("", False), ("n", False)])
def test_a_terminal_is_asked_once(tiny, tmp_path, monkeypatch, answer, starts):
    asked = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or answer)
    if starts:
        assert run.start(tiny, options(tmp_path, yes=False, tty=True)) == 0
    else:
        with pytest.raises(RunError, match="nothing was started"):
            run.start(tiny, options(tmp_path, yes=False, tty=True))
    assert asked == ["start 2 trials? [y/N] "] and (len(campaigns(tmp_path)) == 1) == starts


def test_a_terminal_that_closes_starts_nothing(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(RunError, match="nothing was started"):
        run.start(tiny, options(tmp_path, yes=False, tty=True))


def test_a_results_folder_that_cannot_be_written_is_named(tiny, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="choose another folder with O="):
        run.start(tiny, options(tmp_path / "file"))


def test_a_full_disk_creates_nothing(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=5 << 20))
    with pytest.raises(RunError, match="8 MiB needed for 2 trials, 5 free; make room"):
        run.start(tiny, options(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_the_report_comes_before_the_result(tiny, tmp_path, capsys):
    run.start(tiny, options(tmp_path, report=lambda c: print(f"report of {c.name}")))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("report of tiny-") and lines[-1].startswith("RESULT:")


def test_a_report_that_fails_leaves_the_result(tiny, tmp_path, capsys):
    def fail(campaign):
        raise RunError("no table")

    assert run.start(tiny, options(tmp_path, report=fail)) == 0
    streams = capsys.readouterr()
    assert streams.err == "no report: no table\n" and streams.out.splitlines()[-1].startswith("RESULT: exit=0")


def test_check_tries_one_step_or_all(tiny, tmp_path, capsys):
    place = tmp_path / "check.json"
    assert run.check([tiny], options(tmp_path)) == (0, place)
    assert run.check([tiny], options(tmp_path), tiny.trials[1].id) == (0, place)
    out = capsys.readouterr().out.splitlines()
    assert out == ["check of 2 trials", f"verdict: {place}", "check of 1 trials", f"verdict: {place}"]
    with pytest.raises(RunError, match="STEP=R9: not in tiny; steps: base-s1337 base-s1338"):
        run.check([tiny], options(tmp_path), "R9")


def test_the_lowest_cost_of_a_step_of_each_configuration_is_kept_for_the_next_check(tiny, tmp_path):
    for asked, kept in ((5.0, 5.0), (7.0, 5.0), (3.0, 3.0)):
        run.check([tiny], options(tmp_path, checker=f"tests.run.targets:takes_{asked:.0f}"))
        assert json.loads((tmp_path / "check.json").read_text())["costs"] == {tiny.trials[0].group: kept}


def test_amend_adds_trials_and_continue_runs_only_them(tiny, tmp_path):
    run.start(tiny, options(tmp_path))
    (campaign,) = campaigns(tmp_path)
    assert "1 trials added" in run.amend(campaign, "1")
    assert not run.finished(campaign)
    assert run.status(campaign)["exit"] is None  # the recorded result is that of fewer trials
    assert run.resume(campaign, options(tmp_path)) == 0
    assert drive.attempts(campaign) == [1, 1, 1]
    with pytest.raises(RunError, match="ADD_SEEDS"):
        run.amend(campaign, "x")


def test_the_runner_loads_no_torch(tmp_path):
    code = f"""
import sys
from pathlib import Path
from tests.run import drive
todo, options = drive.real(Path({str(tmp_path / "results")!r}), "tests.run.child:main")
print(drive.run.start(todo, options), "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=drive.ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["0 False"], done.stderr
