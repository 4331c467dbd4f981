# SPDX-License-Identifier: MIT
"""A difference is shown only where everything else is equal or declared; otherwise the field is named."""

import pytest

from ablab.report.compare import NOT_COMPARABLE, compare
from ablab.report.query import QueryError
from tests.report import campaign

ARMS = (("R0", {}), ("R1", {}))


def finals(arm, seed):
    return 2.0 + 0.1 * seed - (0.5 if arm[0] == "R1" else 0)


def symbols(arm):
    return {"ATTN_RECIPROCAL": "y" if arm[0] == "R1" else "n", "OPT_LR": '"6e-4"'}


@pytest.fixture
def results(tmp_path):
    campaign.write(tmp_path, finals, name="ra", arms=ARMS, seeds=(1, 2), symbols=symbols, fates={"r1-s2": "oom"})
    return tmp_path


def row(comparison, key):
    found = (dict(zip(comparison.values.columns, r, strict=True)) for r in comparison.values.rows)
    return next(r for r in found if r["metric"] == key)


def test_arms_of_one_campaign_differ_by_their_declared_treatment(results):
    (found,) = compare(results, "ra/step:R0", ["ra/step:R1"])
    assert found.code == 0 and found.undeclared == ()
    assert found.differences.rows == (("ATTN_RECIPROCAL", "n", "y", "declared"),)
    val = row(found, "val_loss")
    assert (val["base"], val["other"]) == (pytest.approx(2.15), pytest.approx(1.6))
    # over the shared seed alone: 1.6 - 2.1, not 1.6 - 2.15
    assert (val["difference"], val["n base"], val["n other"]) == (pytest.approx(-0.5), 2, 1)
    assert found.missing == ("r1-s2 of ra (oom)",) and "r1-s2 of ra (oom)" in found.text()


def test_another_base_is_not_comparable_and_no_difference_is_shown(results):
    other = lambda arm: {**symbols(arm), "OPT_LR": '"1e-3"'}
    campaign.write(
        results,
        finals,
        name="lr",
        arms=ARMS[:1],
        seeds=(1,),
        contrasts=(),
        symbols=other,
        base={"OPT_LR": '"1e-3"'},
    )
    (found,) = compare(results, "ra/step:R0", ["lr"])
    assert found.code == 3 and found.values is None
    assert f"{NOT_COMPARABLE}: OPT_LR" in found.text() and "SWEEP='OPT_LR=" in found.text()
    assert "2.1" not in found.text()
    (anyway,) = compare(results, "ra/step:R0", ["lr"], anyway=True)
    assert anyway.code == 3 and row(anyway, "val_loss")["difference"] == pytest.approx(0.0)
    assert NOT_COMPARABLE in anyway.text()


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("budget", "limit", 999.0),
        ("batch", "effective", 13),
        ("data", "sha256", campaign.sha("other")),
        ("resolved", "compile", "on"),
        ("software", "torch", "1.0"),
        ("code", "tree", campaign.sha("other")),
        ("cpu", "model", "Other CPU"),
    ],
)
def test_every_protocol_field_is_held_equal(tmp_path, part, field, value):
    def facts(arm):
        manifest = campaign.manifest_facts()
        return {part: {**manifest[part], field: value}} if arm[0] == "R1" else {}

    campaign.write(tmp_path, finals, name="ra", arms=ARMS, seeds=(1,), symbols=symbols, facts=facts)
    (found,) = compare(tmp_path, "ra/step:R0", ["ra/step:R1"])
    name = "hardware" if part == "cpu" else f"{part}.{field}"
    assert found.code == 3 and [text.partition(":")[0] for text in found.undeclared] == [name]


def test_a_protocol_difference_that_is_the_treatment_is_declared(tmp_path):
    compile_on = lambda arm: (
        {"resolved": {**campaign.manifest_facts()["resolved"], "compile": "on"}} if arm[0] == "R1" else {}
    )
    switch = lambda arm: {"SYS_COMPILE_ON": "y" if arm[0] == "R1" else "n"}
    campaign.write(tmp_path, finals, name="c", arms=ARMS, seeds=(1,), symbols=switch, facts=compile_on)
    (found,) = compare(tmp_path, "c/step:R0", ["c/step:R1"])
    assert found.code == 0
    assert [r[0] for r in found.differences.rows] == ["SYS_COMPILE_ON", "resolved.compile"]


def test_campaigns_are_compared_arm_by_arm(results):
    campaign.write(results, lambda a, s: finals(a, s) + 1, name="new", arms=ARMS, seeds=(1, 2), symbols=symbols)
    found = compare(results, "ra", ["new"], keys=["val_loss"])
    assert [row(c, "val_loss")["difference"] for c in found] == [pytest.approx(1.0), pytest.approx(1.0)]


def test_a_metric_that_does_not_exist_is_an_error(results):
    with pytest.raises(ValueError, match="no such metric"):
        compare(results, "ra/step:R0", ["ra/step:R1"], keys=["val_los"])


def test_arms_that_do_not_correspond_are_an_error(results):
    campaign.write(results, finals, name="rest", arms=(("R7", {}), ("R8", {})), seeds=(1,), contrasts=())
    with pytest.raises(QueryError, match="ra has R0, R1; rest has R7, R8"):
        compare(results, "ra", ["rest"])


def test_nothing_done_is_nothing_to_compare(tmp_path):
    campaign.write(tmp_path, finals, name="ra", arms=ARMS, seeds=(1,), fates={"r1-s1": "queued"})
    (found,) = compare(tmp_path, "ra/step:R0", ["ra/step:R1"])
    assert found.code == 1 and "r1-s1 of ra (queued)" in found.text()
