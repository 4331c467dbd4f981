# SPDX-License-Identifier: MIT
"""Selectors, conditions, series and differences over two small campaigns."""

import pytest

from ablab.report import query
from ablab.report.query import QueryError
from ablab.rundir import RunError
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
    table = query.ls(results)
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
    table = query.ls(results, where=where)
    assert [row[table.columns.index("trial")] for row in table.rows] == found


@pytest.mark.parametrize("where", ["val_loss", "val_los<3", "__class__=1", "state=done and"])
def test_a_bad_condition_is_an_error(results, where):
    with pytest.raises(ValueError, match=r"expected NAME=VALUE|no such metric"):
        query.ls(results, where=where)


def test_sort_puts_missing_values_last(results):
    table = query.ls(results, ["ra-one"], sort="value")
    assert [row[-1] for row in table.rows] == [
        pytest.approx(1.6),
        pytest.approx(2.1),
        pytest.approx(2.2),
        None,
    ]
    with pytest.raises(QueryError, match="no such column"):
        query.ls(results, ["ra-one"], sort="val")


def test_keys_count_points_and_first_and_last_step(results):
    table = query.keys(query.resolve(results, ["ra-one/r0-s1"]))
    points = campaign.STEPS // campaign.EVERY + 1
    assert table.rows == (
        ("train_loss", "nats/token", points, 0, campaign.STEPS),
        ("val_loss", "nats/token", points, 0, campaign.STEPS),
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
