# SPDX-License-Identifier: MIT
"""Selectors, conditions, series and differences over two small campaigns."""

import math
import os
import subprocess
import sys

import pytest

from ablab.report import query
from ablab.report.query import QueryError
from ablab.rundir import Imported, Rows, RunError
from tests.report import campaign


def finals(arm, seed):
    return 2.0 + 0.1 * seed - (0.5 if arm[0] == "R1" else 0)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("results")
    arms = (("R0", {}), ("R1", {}))
    campaign.write(path, finals, name="ra-one", arms=arms, seeds=(1, 2), fates={"r1-s2": "diverged"})
    rate = lambda arm: {"OPT_LR": '"1e-3"' if arm[0] == "R0" else '"1e-4"', "OPT_SGD": "n"}
    campaign.write(path, finals, name="lr-two", arms=arms, seeds=(3,), symbols=rate)
    return path


def ids(results, *selectors):
    return [t.id for t in query.resolve(results, selectors)]


@pytest.mark.parametrize(
    ("selector", "found"),
    [
        ("ra-one", ["r0-s1", "r1-s1", "r0-s2", "r1-s2"]),
        ("lr", ["r0-s3", "r1-s3"]),
        ("*", ["r0-s3", "r1-s3", "r0-s1", "r1-s1", "r0-s2", "r1-s2"]),
        ("ra-one/r0-s1", ["r0-s1"]),
        ("ra-one/r0-*", ["r0-s1", "r0-s2"]),
        ("ra-one/step:R1", ["r1-s1", "r1-s2"]),
        (campaign.sha("r1-s2")[:8], ["r1-s2"]),
        ("lr-two/" + campaign.sha("r1-s3")[:6], ["r1-s3"]),
    ],
)
def test_selectors_find_what_they_name(results, selector, found):
    assert ids(results, selector) == found


def test_selectors_add_up_without_repeats(results):
    assert ids(results, "ra-one/r0-s1", "ra-one/r0-*", "lr/step:R0") == ["r0-s1", "r0-s2", "r0-s3"]


@pytest.mark.parametrize("selector", ["nope", "ra-one/r9*", "step:R9", "imported:x", "00000000", "../etc", "[", ""])
def test_a_selector_that_finds_nothing_is_an_error_that_lists_the_campaigns(results, selector):
    with pytest.raises((QueryError, RunError)) as error:
        query.resolve(results, [selector])
    assert "\n" not in str(error.value)


def test_ls_without_selector_lists_campaigns(results):
    table = query.campaigns(results, [])
    assert [dict(zip(table.columns, r, strict=True))["campaign"] for r in table.rows] == ["lr-two", "ra-one"]
    assert [r[-2:] for r in table.rows] == [(2, 2), (4, 3)]


@pytest.mark.parametrize(
    ("where", "found"),
    [
        ("state=done and val_loss<2", ["r1-s3", "r1-s1"]),
        ("state!=done", ["r1-s2"]),
        ("seed>=2 and step=R0", ["r0-s3", "r0-s2"]),
        ("OPT_LR<=1e-4", ["r1-s3"]),
        ("CONFIG_OPT_SGD=n", ["r0-s3", "r1-s3"]),
        ("OPT_LR=__import__('os')", []),
    ],
)
def test_conditions_select_rows(results, where, found):
    table = query.ls(query.resolve(results, ["*"]), where)
    assert [row[table.columns.index("trial")] for row in table.rows] == found


@pytest.mark.parametrize(
    "where", ["val_loss", "val_los<3", "state=nope and val_los<3", "__class__=1", "state=done and"]
)
def test_a_bad_condition_is_an_error(results, where):
    with pytest.raises(ValueError, match=r"expected NAME=VALUE|no such metric"):
        query.ls(query.resolve(results, ["*"]), where)


def test_sort_puts_missing_values_last(results):
    table = query.arranged(query.ls(query.resolve(results, ["ra-one"])), "value")
    assert [row[-1] for row in table.rows] == [
        pytest.approx(1.6),
        pytest.approx(2.1),
        pytest.approx(2.2),
        None,
    ]
    with pytest.raises(QueryError, match="no such column"):
        query.arranged(query.campaigns(results, []), "val")


def test_keys_count_points_and_first_and_last_step(results):
    table = query.keys(query.resolve(results, ["ra-one/r0-s1"]))
    points = campaign.STEPS // campaign.EVERY + 1
    assert table.rows == (
        ("train_loss", "nats/token", points, 0, campaign.STEPS, 1),
        ("val_loss", "nats/token", points, 0, campaign.STEPS, 1),
    )
    assert query.keys(query.resolve(results, ["ra-one/r0-s1"]), "gpu/").rows == ()


def test_series_thins_the_output_and_keeps_both_ends(results):
    trials = query.resolve(results, ["ra-one/r0-s1"])
    full = query.series(trials, ["val_loss"], "tokens")
    thin = query.series(trials, ["val_loss"], "tokens", 3)
    assert (thin.rows[0], thin.rows[-1], len(thin.rows)) == (full.rows[0], full.rows[-1], 3)
    assert full.rows[1][2:] == (campaign.EVERY * 768, campaign.loss(2.1, campaign.EVERY))
    with pytest.raises(QueryError, match="axes: step tokens"):
        query.series(trials, ["val_loss"], "epoch")


def test_diff_shows_symbols_that_differ_and_nothing_else(results):
    a, b = query.resolve(results, ["lr-two"])
    assert query.diff(a, b).rows == (("OPT_LR", '"1e-3"', '"1e-4"', "base", "base"),)
    assert {row[0] for row in query.diff(a, b, True).rows} == {"OPT_LR", "OPT_SGD", "TRAIN_SEED"}


def test_series_tells_trials_without_a_point(results):
    trials = query.resolve(results, ["lr-two"])
    (results / "lr-two/trials").joinpath(trials[1].dir.name, "attempts/1/metrics.jsonl").unlink()
    table = query.series(query.resolve(results, ["lr-two"]), ["val_loss"])
    assert {row[1] for row in table.rows} == {"r0-s3"}
    assert table.notes == ("r1-s3 of lr-two (damaged): no val_loss",)


def test_series_aligns_metrics_of_different_rows(tmp_path):
    made = campaign.write(tmp_path, finals, arms=(("R0", {}),), seeds=(1,), contrasts=())
    attempt = made.trials()[0].attempt(1)
    rows = Rows(attempt.metrics, "metrics", {"trial": "x", "attempt": 1, "resumed_at_step": 0})
    rows.row(300, {"grad_norm": math.inf}, tokens=1, train_s=1.0, wall_s=1.0, flops=1.0)
    rows.row(301, {"grad_norm": 2.0, "val_loss": 1.0}, tokens=1, train_s=1.0, wall_s=1.0, flops=1.0)
    rows.close()
    table = query.series(query.resolve(tmp_path, ["*"]), ["grad_norm", "val_loss"])
    assert [row[2:] for row in table.rows][-3:] == [(200, None, 2.1), (300, None, None), (301, 2.0, 1.0)]
    assert table.json()


def run(*words, **environment):
    command = [sys.executable, "-m", "ablab", *words]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["ls", "ra-one"], 0, "r1-s2"),
        (["ls", "ra-one", "--where", "seed>9"], 1, "campaign"),
        (["ls", "nope"], 1, "nope: selects no trial; write CAMPAIGN, "),
        (["keys", "ra-one", "--prefix", "gpu/"], 1, "metric"),
        (["keys", "deadbeef"], 1, "selects no trial"),
        (["keys"], 2, "SEL= is missing"),
        (["keys", "ra-one", "--where", "x"], 2, "WHERE"),
        (["series", "ra-one/r0-s1", "--key", "val_los"], 2, "no such metric; nearest: val_loss"),
        (["series", "ra-one/r0-s1", "--key", "val_loss", "--key", "train_loss"], 0, "train_loss"),
        (["series", "ra-one/r0-s1", "--key", "memory/num_ooms"], 1, "r0-s1 of ra-one (done): no memory/num_ooms"),
        (["diff", "ra-one/r0-s1", "ra-one/r0-s2", "--all"], 0, "TRAIN_SEED"),
        (["compare", "ra-one/step:R0", "ra-one/step:R1"], 0, "not counted: r1-s2 of ra-one (diverged)"),
        (["compare", "ra-one/r0-s1", "lr-two/r0-s3", "FORMAT=csv"], 3, "OPT_LR"),
        (["compare", "ra-one/r0-s1", "lr-two/r0-s3", "--show-anyway"], 3, "NOT COMPARABLE"),
        (["compare", "ra-one/r0-s1", "lr-two/r0-s3", "--lens", "cost"], 2, "LENS=cost: not time, tokens, flops"),
        (["keys", "ra-one", "PROJECT=p"], 2, "PROJECT=p: of a tracker; add SOURCE=wandb or trackio"),
        (["keys", "ra-one", "SOURCE=aim"], 2, "SOURCE=aim: not local, wandb or trackio"),
        (["keys", "x", "SOURCE=wandb"], 2, "of which project? add PROJECT="),
    ],
)
def test_verbs_end_with_the_promised_code(results, words, code, text):
    if words[0] == "compare" and "lr-two/r0-s3" in words:
        words = [w.replace("lr-two", "lr-base") for w in words]
        if not (results / "lr-base").exists():
            rate = lambda arm: {"OPT_LR": '"1e-3"'}
            base = {"OPT_LR": '"1e-3"'}
            campaign.write(results, finals, name="lr-base", arms=(("R0", {}),), seeds=(3,), symbols=rate, base=base)
    done = run(*words, f"O={results}")
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stdout + done.stderr
    assert text in done.stdout + done.stderr


def test_an_ambiguous_name_is_exit_2_and_lists_the_candidates(tmp_path):
    for name in ("ra-one", "ra-two"):
        campaign.write(tmp_path, finals, name=name, arms=(("R0", {}),), seeds=(1,), contrasts=())
    done = run("keys", "ra", f"O={tmp_path}")
    assert done.returncode == 2 and "ra-one ra-two" in done.stderr


@pytest.mark.parametrize("form", ["table", "json", "csv"])
def test_out_writes_what_would_be_printed(results, tmp_path, form):
    words = ["series", "ra-one/r0-s1", "KEY=val_loss", f"FORMAT={form}", f"O={results}"]
    shown = run(*words)
    done = run(*words, "--out", str(tmp_path / "out"))
    assert (done.returncode, done.stdout) == (0, f"written: {tmp_path / 'out'}\n")
    assert (tmp_path / "out").read_text() == shown.stdout


def test_an_imported_run_is_selected_by_that_word_only(tmp_path):
    campaign.write(tmp_path, finals, name="ours", arms=(("R0", {}),), seeds=(1,), contrasts=())
    place = Imported(tmp_path, "theirs")
    place.path.mkdir(parents=True)
    rows = Rows(place.metrics, "metrics", {"trial": "theirs", "attempt": 1, "resumed_at_step": 0})
    for step in range(3):
        axes = {"tokens": 0.0, "train_s": float(step), "wall_s": 0.0, "flops": 0.0}
        rows.line({"q": step, "t": 0.0, "step": step, **axes, "m": {"val_loss": 3.0 - step, "their/name": 1}})
    rows.close()
    place.seal("wandb:a/b/c", {"batch_size": 8}, [], 3)
    assert [t.campaign for t in query.resolve(tmp_path, ["*"])] == ["ours"]
    (run,) = query.resolve(tmp_path, ["imported:th*"])
    assert run.points("val_loss", "train_s") == [(0.0, 3.0), (1.0, 2.0), (2.0, 1.0)]
    assert [row[0] for row in query.keys([run]).rows] == ["val_loss", "their/name"]
    with pytest.raises(query.NothingError, match="imported: theirs"):
        query.resolve(tmp_path, ["imported:ours"])
    place.metrics.chmod(0o644)
    place.metrics.write_text(place.metrics.read_text().replace("2.0", "1.0"))
    with pytest.raises(RunError, match="is not what was imported"):
        query.keys(query.resolve(tmp_path, ["imported:theirs"]))


def test_conditions_are_never_run(results, tmp_path):
    trials = query.resolve(results, ["ra-one"])
    assert query.ls(trials, f"val_loss<__import__('os').mkdir('{tmp_path}/x')").rows == ()
    for where in ("state=done or 1=1", "().__class__=1"):
        with pytest.raises(ValueError):
            query.ls(trials, where)
    assert not (tmp_path / "x").exists()


def test_hostile_names_stay_inert(tmp_path):
    made = campaign.write(tmp_path, finals, arms=(("R0", {}),), seeds=(1,), contrasts=())
    name = "=1+1\\u001b[31m<img>"
    with open(made.trials()[0].attempt(1).metrics, "a") as file:
        file.write('{"step":999,"m":{"' + name + '":1.0}}\n')
    table = query.keys(query.resolve(tmp_path, ["*"]))
    assert "\x1b" not in table.text() + table.csv() and "\n'=1+1" in table.csv()
    assert table.rows[0][:2] == ("=1+1\x1b[31m<img>", None)


def test_a_campaign_with_a_damaged_plan_is_named(tmp_path):
    made = campaign.write(tmp_path, lambda arm, seed: 2.0)
    plan = made.path / "campaign.json"
    plan.write_bytes(plan.read_bytes()[:100])
    damage: list[str] = []
    assert query.campaigns(tmp_path, damage).rows == () and [str(plan) in text for text in damage] == [True]
    with pytest.raises(RunError, match="campaign.json: damaged"):
        query.resolve(tmp_path, [made.name])
