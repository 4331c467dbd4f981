# SPDX-License-Identifier: MIT
"""A difference is shown only where everything else is equal or declared; otherwise the field is named."""

import json

import pytest

from ablab import rundir
from ablab.report import compare as comparing
from ablab.report import query
from ablab.report.compare import NOT_COMPARABLE
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


def compare(results, base, others, **options):
    sides = [query.resolve(results, [selector]) for selector in (base, *others)]
    return comparing.compare(sides[0], sides[1:], **options)


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
    assert [r[0] for r in found.differences.rows] == ["resolved.compile", "SYS_COMPILE_ON"]


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


def slower(trial, factor):
    """Its clock and tokens run `factor` times as fast."""
    path = trial.attempt(1).metrics
    head, *lines = path.read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    scaled = [{**r, "train_s": r["train_s"] * factor, "tokens": r["tokens"] * factor} for r in rows]
    path.write_text("\n".join([head, *map(json.dumps, scaled)]) + "\n")
    rundir.publish(trial, 1, trial.lease()["lease"])


@pytest.fixture
def uneven(tmp_path):
    made = campaign.write(tmp_path, finals, name="ra", arms=ARMS, seeds=(1,), symbols=symbols)
    slower(next(t for t in made.trials() if t.record["id"] == "r1-s1"), 2)
    return tmp_path


@pytest.mark.parametrize(("lens", "axis", "at"), [("time", "train_s", 20.0), ("tokens", "tokens", 200 * 768)])
def test_a_lens_compares_at_the_largest_amount_that_all_reached(uneven, lens, axis, at):
    (found,) = compare(uneven, "ra/step:R0", ["ra/step:R1"], keys=["val_loss"], lens=lens)
    val = row(found, "val_loss")
    # R1 had used that at its step 100; R0 at its end
    assert val["base"] == pytest.approx(2.1) and val["other"] == pytest.approx(campaign.loss(1.6, 100))
    assert val["difference"] == pytest.approx(campaign.loss(1.6, 100) - 2.1)
    assert val["note"] == f"at {axis} {at:.6g}; mid-schedule: other"


def test_a_lens_interpolates_between_rows_and_never_beyond(tmp_path):
    made = campaign.write(tmp_path, finals, name="ra", arms=ARMS, seeds=(1,), symbols=symbols)
    slower(next(t for t in made.trials() if t.record["id"] == "r1-s1"), 200 / 190)
    (found,) = compare(tmp_path, "ra/step:R0", ["ra/step:R1"], keys=["val_loss"], lens="time")
    between = (campaign.loss(1.6, 180) + campaign.loss(1.6, 200)) / 2
    assert row(found, "val_loss")["other"] == pytest.approx(between)


def test_a_constant_rate_has_no_schedule_to_be_in(tmp_path):
    constant = lambda arm: {**symbols(arm), "SCHED_CONSTANT": "y"}
    made = campaign.write(tmp_path, finals, name="ra", arms=ARMS, seeds=(1,), symbols=constant)
    slower(next(t for t in made.trials() if t.record["id"] == "r1-s1"), 2)
    (found,) = compare(tmp_path, "ra/step:R0", ["ra/step:R1"], keys=["val_loss"], lens="time")
    assert row(found, "val_loss")["note"] == "at train_s 20"


def test_a_metric_that_starts_later_has_no_value_there(uneven):
    (found,) = compare(uneven, "ra/step:R0", ["ra/step:R1"], keys=["memory/num_ooms"], lens="time")
    val = row(found, "memory/num_ooms")
    assert val["difference"] is None and val["note"] == "no memory/num_ooms over train_s"


@pytest.mark.parametrize(("peak", "note"), [(2**28, "peak 0.25 | 0.25 GiB"), (2**29, "not equal: peak 0.25 | 0.5 GiB")])
def test_the_memory_lens_needs_equal_peaks(tmp_path, peak, note):
    made = campaign.write(tmp_path, finals, name="ra", arms=ARMS, seeds=(1,), symbols=symbols)
    trial = next(t for t in made.trials() if t.record["id"] == "r1-s1")
    summary = trial.summary()
    trial.write("summary", {**summary, "perf": {**summary["perf"], "peak_mem_bytes": peak}})
    rundir.publish(trial, 1, trial.lease()["lease"])
    (found,) = compare(tmp_path, "ra/step:R0", ["ra/step:R1"], lens="memory")
    val = row(found, "val_loss")
    assert val["note"] == note and (val["difference"] is None) == note.startswith("not")


def test_speed_is_a_mean_over_time_and_not_the_last_row(tmp_path):
    made = campaign.write(tmp_path, finals, name="ra", arms=ARMS, seeds=(1,), symbols=symbols)
    for trial, last in zip(made.trials(), (10.0, 40.0), strict=True):
        path = trial.attempt(1).metrics
        axes = {"tokens": 1, "wall_s": 1, "flops": 1}
        rows = [(201, 21.0, last), (202, 60.0, 20.0)]  # 21 s, since nothing said it before, then 39 s
        lines = [
            json.dumps({"step": s, "train_s": t, **axes, "m": {"train/tok_per_sec": v}, "bad": []}) for s, t, v in rows
        ]
        path.write_text(path.read_text() + "\n".join(lines) + "\n")
        rundir.publish(trial, 1, trial.lease()["lease"])
    (found,) = compare(tmp_path, "ra/step:R0", ["ra/step:R1"], keys=["train/tok_per_sec"])
    val = row(found, "train/tok_per_sec")
    assert val["base"] == pytest.approx((21 * 10 + 39 * 20) / 60) and val["other"] == pytest.approx(27.0)


def test_every_form_holds_differences_values_and_what_is_missing(results):
    found = compare(results, "ra/step:R0", ["ra/step:R1"], keys=["val_loss"])
    kinds = [(r[1], r[2]) for r in comparing.flat(found).rows]
    assert kinds == [("declared", "ATTN_RECIPROCAL"), ("value", "val_loss"), ("missing", "r1-s2 of ra (oom)")]
    data = json.loads(json.dumps(found[0].data()))
    assert data["differences"][0]["what"] == "ATTN_RECIPROCAL" and data["values"][0]["metric"] == "val_loss"
