# SPDX-License-Identifier: MIT
"""Forecasts outlive the process that makes them, die with the code, and are scored by what really happened."""

import json
import math
from dataclasses import replace

import pytest

from ablab import configure, kconf, machine, plan, run, rundir
from ablab.run import _forecast
from tests.run import drive

TWO = {"mem_gib": [1.0, 2.0, 3.0], "hours": [0.5, 1.0, 2.0], "items": {"weights": 1 << 29}, "steps": 50}


def expand(**variables):
    return plan.expand(configure.layers(kconf.ROOT, "tiny"), variables, machine.inventory(), name="tiny")


@pytest.fixture(scope="module")
def tiny():
    """Three configurations, two seeds each."""
    return expand(SEEDS="2", SWEEP="OPT_LR=1e-3,2e-3,3e-3")


def groups(p):
    return list(dict.fromkeys(t.group for t in p.trials))


def test_what_was_forecast_is_known_to_the_next_plan(tiny, tmp_path):
    one, two, three = groups(tiny)
    _forecast.keep(tmp_path, {one: TWO})
    _forecast.keep(tmp_path, {two: TWO})
    assert _forecast.known(tmp_path) == {one: TWO, two: TWO}
    found, lines = run.expected(tiny, run.Options(results=tmp_path))
    assert (found["missing"], found["of"], found["hours"]) == (1, 3, None)
    assert lines == ["not made for 1 of 3 configurations; make estimate"]
    _forecast.keep(tmp_path, {three: {**TWO, "mem_gib": [2.0, 3.0, 4.0]}})
    found, lines = run.expected(tiny, run.Options(results=tmp_path))
    assert found["hours"] == [3.0, 6.0, 12.0] and found["mem_gib"] == [2.0, 3.0, 4.0]
    assert lines[0].startswith("time 3.0 / 6.0 / 12.0 h, 6 trials one after another; memory 2.00 / 3.00 / 4.00 GiB")
    assert f"forecast    {lines[0]}" in plan.listing(tiny, lines)


def test_trials_that_run_at_once_share_the_time(tmp_path):
    p = expand(SEEDS="4", JOBS="2")
    _forecast.keep(tmp_path, {groups(p)[0]: TWO})
    found, lines = run.expected(p, run.Options(results=tmp_path))
    assert found["hours"] == [1.0, 2.0, 4.0] and "4 trials 2 at once" in lines[0]


def test_other_code_and_another_machine_know_nothing(tiny, tmp_path, monkeypatch):
    _forecast.keep(tmp_path, {groups(tiny)[0]: TWO})
    with monkeypatch.context() as other:
        other.setattr(_forecast.provenance, "tree", lambda: "0" * 64)
        assert _forecast.known(tmp_path) == {}
    with monkeypatch.context() as other:
        other.setattr(_forecast, "_here", lambda: replace(machine.inventory(), cpu="another"))
        assert _forecast.known(tmp_path) == {}
    assert _forecast.known(tmp_path)
    rundir.forecasts(tmp_path).write_text("{}")
    assert _forecast.known(tmp_path) == {}


def test_a_length_that_data_has_yet_to_tell_is_not_kept(tiny, tmp_path):
    one = groups(tiny)[0]
    assert _forecast.keep(tmp_path, {one: {**TWO, "hours": None, "steps": None}}).keys() == {one}
    assert _forecast.known(tmp_path) == {} and not list(tmp_path.iterdir())
    _forecast.keep(tmp_path, {one: {**TWO, "hours": None}})  # a device without a known peak
    assert _forecast.known(tmp_path)[one]["hours"] is None


def test_the_past_is_the_median_error_and_the_share_inside_the_band(tmp_path):
    actuals = [(2.0, 1.0), (4.0, 1.5), (1.0, 0.25)]  # likely is 2 and 1: off by 0, .5, 1 and 0, 1/3, 3
    rows = [{"on": "X", "mem_gib": [1.0, 2.0, 3.0], "hours": [0.5, 1.0, 2.0], "actual": a} for a in actuals]
    rows += [{**rows[0], "on": "Y"}]
    for name, some in (("a", rows[:2]), ("b", rows[2:])):
        (tmp_path / name).mkdir()
        text = [{"schema": "ablab.forecast/1", "campaign": name}, *some]
        (tmp_path / name / "forecast.jsonl").write_text("".join(json.dumps(line) + "\n" for line in text) + '{"tor')
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "forecast.jsonl").write_text("not ours\n")
    found = _forecast.past(tmp_path, "X")
    assert found["trials"] == 3
    assert found["of"]["memory"] == {"error": 0.5, "hit": pytest.approx(2 / 3)}
    assert found["of"]["time"] == {"error": pytest.approx(1 / 3), "hit": pytest.approx(2 / 3)}
    assert _forecast.past(tmp_path, "Z") is None
    assert len(list(rundir.scores(tmp_path))) == 4


def test_a_start_forecasts_freezes_and_scores_every_trial(tmp_path, capfd):
    todo, options = drive.real(tmp_path / "results", "ablab.train:main")
    options = replace(options, checker="ablab.check:main", check=False)
    assert run.start(todo, options) == 0
    (campaign,) = rundir.campaigns(tmp_path / "results")
    scored = list(rundir.scores(tmp_path / "results"))
    assert sorted(s["trial"] for s in scored) == sorted(t.folder for t in todo.trials)
    for trial, line in zip(campaign.trials(), sorted(scored, key=lambda s: s["trial"]), strict=True):
        told, used = trial.record["forecast"], trial.summary()["used"]
        assert line["hours"] == told["hours"] and line["actual"][1] == pytest.approx(used["total_s"] / 3600)
        assert trial.record["resources"]["mem_gib"] == told["mem_gib"][2] and told["items"]["weights"] > 1e5
    out = capfd.readouterr().out
    assert "not made for 1 of 1 configurations" in out and "forecast  time 0." in out
    found, _ = run.expected(todo, options)
    assert found["missing"] == 0 and found["past"]["trials"] == 2
    chosen = campaign.read("auto")["chosen"]
    assert [c["symbol"] for c in chosen] == [a["symbol"] for a in todo.autos] and len(chosen) >= 4
    capfd.readouterr()
    assert run.forecast(todo, options) == 0
    out = capfd.readouterr().out
    assert out.startswith(f"{todo.trials[0].id} x 2: memory 0.") and "50 steps" in out and "past: 2 trials here" in out


def options(tmp_path, **changes):
    return drive.options(**{"results": tmp_path, **changes})


GPU = machine.Machine(
    cores=(0, 1),
    memory_bytes=1 << 34,
    cpu="cpu",
    devices=(machine.Device(kind="cuda", name="card", uuid="GPU-1", memory_bytes=1 << 36),),
    host="h",
    boot_id="b",
)


def on_gpu(known):
    return plan.expand(configure.layers(kconf.ROOT, "tiny"), {}, GPU, name="tiny", measured=known)


def test_what_a_gpu_decided_is_remembered_and_counts_for_the_next_plan(tmp_path):
    before = on_gpu(run.decided(tmp_path))
    assert before.measured is None
    assert run.measure(before, options(tmp_path, checker="tests.run.targets:measures")) == 0
    after = on_gpu(run.decided(tmp_path))
    assert after.measured == {"free": 1} and after.hash != before.hash
    assert after.trials[0].values["TRAIN_BATCH_MICRO"] == 4 and after.trials[0].values["SYS_COMPILE_OFF"]
    assert on_gpu(run.decided(tmp_path)).hash == after.hash  # so a second start continues


def test_where_nothing_fits_nothing_is_remembered(tmp_path):
    p = on_gpu({})
    assert run.measure(p, options(tmp_path, checker="tests.run.targets:fits_nowhere")) == 4
    assert run.decided(tmp_path) == {}


def test_a_gpu_that_torch_does_not_see_is_refused_in_words(tmp_path, capsys):
    p = on_gpu({})
    assert run.measure(p, options(tmp_path, checker="ablab.check:main", preload=("torch", "ablab.train"))) == 2
    assert "CONFIG_TRAIN_BATCH_MICRO=0: no memory can be measured" in capsys.readouterr().out


def scored(tmp_path, rows, on="X"):
    """A campaign whose trials finished: (group, raw memory, raw hours, memory, hours) each."""
    (tmp_path / "past").mkdir(parents=True, exist_ok=True)
    lines = [{"schema": "ablab.forecast/1", "campaign": "past"}]
    for group, mem, hours, *actual in rows:
        told = {"mem_gib": [mem / 2, mem, mem * 2], "hours": [hours / 2, hours, hours * 2]}
        lines.append({"trial": group, "group": group, "on": on, "raw": [mem, hours], "actual": actual, **told})
    (tmp_path / "past/forecast.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_band_is_the_interval_of_student_for_the_next_ratio(tmp_path):
    """Five logarithms of known mean and deviation; 1.533 is the 90 % point of t with 4 degrees of freedom."""
    logs = [-0.2, -0.1, 0.0, 0.1, 0.2]
    scored(tmp_path, [(f"g{i}", 2.0, 1.0, 2 * math.exp(x), math.exp(x)) for i, x in enumerate(logs)])
    low, likely, high = _forecast.band(tmp_path, "X")["mem_gib"]
    half = 1.533 * math.sqrt(sum(x * x for x in logs) / 4) * math.sqrt(1 + 1 / 5)
    assert likely == pytest.approx(1.0) and math.log(high) == pytest.approx(half, rel=5e-3)
    assert math.log(low) == pytest.approx(-half, rel=5e-3)


def test_seeds_of_one_configuration_count_once_and_few_teach_nothing(tmp_path):
    scored(tmp_path, [("same", 1.0, 1.0, 1.1, 1.1)] * 50 + [(f"g{i}", 1.0, 1.0, 1.0, 1.0) for i in range(2)])
    assert _forecast.band(tmp_path, "X") is None
    scored(tmp_path, [(f"g{i}", 1.0, 1.0, 1.0, 1.0) for i in range(4)])
    assert _forecast.band(tmp_path, "X")["hours"][2] == pytest.approx(math.exp(_forecast.NARROW))
    assert _forecast.band(tmp_path, "Y") is None


def test_what_one_card_teaches_goes_for_all_of_its_kind(tmp_path):
    scored(tmp_path, [(f"g{i}", 1.0, 1.0, 2.0, 2.0) for i in range(5)], on="NVIDIA A10G")
    assert _forecast.band(tmp_path, machine.named("a10g"))["mem_gib"][1] == pytest.approx(2.0)


def test_a_fitted_forecast_keeps_what_is_exact_and_what_was_raw():
    items = dict.fromkeys(("weights", "gradients", "optimizer", "masks"), 1 << 28)  # a GiB together
    made = {"g": {**TWO, "items": items}, "h": {**TWO, "hours": None}}
    found = _forecast.fitted(made, {"mem_gib": [0.1, 0.9, 1.5], "hours": [0.5, 1.0, 3.0]})
    assert found["g"]["mem_gib"] == [1.0, 1.8, 3.0] and found["g"]["hours"] == [0.5, 1.0, 3.0]
    assert found["g"]["raw"] == [2.0, 1.0] and found["h"]["hours"] is None and found["h"]["raw"] == [2.0, None]
    assert _forecast.fitted(made, None) is made


def test_cost_energy_and_disk_follow_the_hours_of_all_devices(tmp_path):
    here = machine.inventory()
    gpus = (machine.Device(kind="cuda", name="A10G", uuid="A10G", memory_bytes=0),) * 2
    asked = {"SEEDS": "4", "CONFIG_SYS_PRICE_PER_HOUR": "1.5"}
    p = plan.expand(configure.layers(kconf.ROOT, "tiny"), asked, replace(here, devices=gpus), name="tiny")
    assert plan.expand(configure.layers(kconf.ROOT, "tiny"), {"SEEDS": "4"}, here).trials[0].group  # no price: settles
    found = _forecast.of(p, dict.fromkeys(groups(p), TWO), tmp_path, "a10g", 2)
    assert found["jobs"] == 2 and found["hours"] == [1.0, 2.0, 4.0]
    assert found["cost"] == [3.0, 6.0, 12.0] and found["kwh"] == pytest.approx([0.6, 1.2, 2.4])  # 300 W
    kept = 1 + sum(int(p.trials[0].values[k]) for k in _forecast.KEPT)
    assert found["disk_gib"] == 4 * kept * 0.5
    assert "cost 3 / 6 / 12 by SYS_PRICE_PER_HOUR; energy 0.6 / 1.2 / 2.4 kWh" in _forecast.lines(found, 4)[1]


def test_a_price_is_no_part_of_a_trial():
    with_price = expand(**{"CONFIG_SYS_PRICE_PER_HOUR": "2"})
    assert [t.hash for t in with_price.trials] == [t.hash for t in expand().trials]


@pytest.mark.parametrize(("rooms", "fits"), [([1 << 30], False), ([1 << 30, 8 << 30], True), ([], True)])
def test_what_is_beyond_the_largest_device_is_refused(rooms, fits):
    why = _forecast.beyond({"mem_gib": [1.5, 2.0, 3.0]}, rooms)
    assert (why is None) is fits and (fits or why == "needs 1.50 GiB at the very least, 0.93 are there")
