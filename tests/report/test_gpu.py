# SPDX-License-Identifier: MIT
"""Samples to windows against integration by hand; hints and verdicts on made-up trials; the verb on real folders."""

import json
import random

import pytest

from ablab import __main__ as cli
from ablab import machine, metrics, rundir
from ablab.report import gpu, query
from tests.report import campaign

A, B = "GPU-a", "GPU-b"


def samples(*rows, period_ms=1000):
    """Header and samples of (t, {device: reading}, host)."""
    head = {"schema": "ablab.telemetry/1", "trial": "x", "attempt": 1, "period_ms": period_ms}
    return [head, *({"t": t, "devices": devices, "host": host} for t, devices, host in rows)]


def steady(times, **reading):
    return samples(*((float(t), {A: reading}, {}) for t in times))


def rows(*times, **axes):
    return [{"t": float(t), "step": i, "train_s": float(t), "flops": 0.0, "m": {}, **axes} for i, t in enumerate(times)]


def test_each_sample_belongs_to_the_window_it_fell_into():
    found = samples(*((float(t), {A: {"busy_pct": 10.0 * t}}, {}) for t in range(1, 9)))
    got = gpu.window(found, rows(2, 4.5, 8))
    busy = [row["m"]["gpu/compute_util_avg"] for row in got]
    assert busy == pytest.approx([(10 + 20) / 2, (30 + 40 + 0.5 * 50) / 2.5, (0.5 * 50 + 60 + 70 + 80) / 3.5])
    assert [row["step"] for row in got] == [0, 1, 2] and all(row["m"]["gpu/coverage"] == 1 for row in got)


def test_means_equal_an_integration_on_a_fine_grid():
    """Random times, gaps and values; the oracle walks the time axis in steps of a millisecond."""
    dice = random.Random(7)
    for _ in range(20):
        t, found = 0.0, []
        for _ in range(30):
            t = round(t + dice.choice([1.0, 1.0, 1.0, 1.4, 0.3, 5.0]), 3)
            found.append((t, dice.uniform(0, 100)))
        ends = sorted({round(dice.uniform(0, t + 3), 3) for _ in range(6)})
        got = gpu.window(samples(*((t, {A: {"busy_pct": v}}, {}) for t, v in found)), rows(*ends))
        begin, at = found[0][0] - 1.0, {}
        for i, (t, v) in enumerate(found):
            since = t - found[i - 1][0] if i else 1.0
            at[t] = (t - (since if since <= 1.5 else 1.0), v)
        for row, end in zip(got, [e for e in ends if e > begin], strict=True):
            grid = [begin + 1e-3 * (k + 0.5) for k in range(round((end - begin) * 1000))]
            hit = [v for g in grid for t, (start, v) in at.items() if start < g <= t]
            assert row["m"]["gpu/coverage"] == pytest.approx(len(hit) / max(len(grid), 1), abs=5e-3)
            if len(hit) > 100:
                assert row["m"]["gpu/compute_util_avg"] == pytest.approx(sum(hit) / len(hit), abs=1.0)
            begin = end


def test_a_gap_stays_a_gap():
    got = gpu.window(steady([1, 2, 3, 20, 21], busy_pct=50.0, power_w=100.0), rows(3, 10, 21))
    assert [round(r["m"]["gpu/coverage"], 3) for r in got] == [1.0, 0.0, round(2 / 11, 3)]
    assert got[1]["m"].keys() == {"gpu/coverage"}


def test_energy_is_the_difference_of_a_counter_also_over_a_gap():
    found = samples(*((float(t), {A: {"energy_j": 1000 + 100.0 * t, "power_w": 1.0}}, {}) for t in (1, 2, 3, 9, 10)))
    got = gpu.window(found, rows(3, 6, 10))
    assert [r["m"]["gpu/energy_j"] for r in got] == pytest.approx([200, 300, 400])
    assert [r["energy"] for r in got] == ["counter"] * 3


def test_energy_without_a_counter_is_integrated_power_and_marked():
    got = gpu.window(steady([1, 2, 3, 4], power_w=250.0), rows(2, 4))
    assert [(r["m"]["gpu/energy_j"], r["energy"]) for r in got] == [(500.0, "integrated")] * 2
    back = samples(*((float(t), {A: {"energy_j": e, "power_w": 10.0}}, {}) for t, e in ((1, 900), (2, 5), (3, 15))))
    assert gpu.window(back, rows(3))[0]["energy"] == "integrated", "a counter that began anew counts nothing"


def test_devices_are_numbered_as_the_trial_opened_them_and_totals_do_not_care():
    two = {A: {"busy_pct": 90.0, "used_bytes": 10e9, "temp_c": 60.0, "throttle": ["power_cap"]}}
    two[B] = {"busy_pct": 30.0, "used_bytes": 4e9, "temp_c": 80.0, "throttle": []}
    ways = [
        gpu.window(samples((1.0, dict(order), {})), rows(1))[0]["m"] for order in (two.items(), reversed(two.items()))
    ]
    for m, busy in zip(ways, ([90, 30], [30, 90]), strict=True):
        assert [m["gpu/0/compute_util_avg"], m["gpu/1/compute_util_avg"]] == busy
        assert m["gpu/compute_util_avg"] == 60 and m["gpu/load_cv"] == 50 and m["gpu/throttle_pct"] == 50
        assert m["gpu/memory_used_total_gb"] == 14 and m["gpu/memory_used_avg_gb"] == 7 and m["gpu/temp_max_c"] == 80


def test_what_one_device_lacks_has_no_total():
    m = gpu.window(samples((1.0, {A: {"power_w": 100.0}, B: {"busy_pct": 1.0}}, {})), rows(1))[0]["m"]
    assert "gpu/power_w" not in m and m["gpu/0/power_w"] == 100 and "gpu/energy_j" not in m


def test_cpu_time_is_a_rate_whatever_the_distance_of_samples():
    host = [(1.0, {}, {"rss_bytes": 1 << 30}), (2.0, {}, {"rss_bytes": 1 << 30, "cpu_s": 1.5, "loader_cpu_s": 0.5})]
    m = gpu.window(samples(*host, (6.0, {}, {"rss_bytes": 3 << 30, "cpu_s": 6.0})), rows(2, 6))
    assert m[0]["m"] == {"host/coverage": 1, "host/cpu_pct": 150, "host/loader_cpu_pct": 50, "host/ram_used_gib": 1}
    assert m[1]["m"]["host/cpu_pct"] == 150 and m[1]["m"]["host/coverage"] == 0.25


def test_a_slow_reader_stands_for_its_own_period():
    slow = [(1.0, {A: {"busy_pct": 40.0, "period_s": 30.0}}, {}), (31.0, {A: {"busy_pct": 60.0, "period_s": 30.0}}, {})]
    m = gpu.window(samples(*slow), rows(1, 31))
    assert m[1]["m"]["gpu/coverage"] == 1 and m[1]["m"]["gpu/compute_util_avg"] == 60


def test_nothing_comes_of_nothing():
    assert gpu.window([], rows(1, 2)) == [] and gpu.window(samples(), rows(1)) == []


def test_exactly_what_is_registered_is_made():
    reading = {key: 1.0 for key, _ in gpu.KEYS.values()} | {"energy_j": 5.0, "throttle": ["power_cap"], "shared": True}
    host = {"cpu_s": 1.0, "loader_cpu_s": 0.5, "rss_bytes": 1}
    made = gpu.window(samples(*((float(t), {A: reading, B: reading}, host) for t in (1, 2))), rows(2))[0]["m"]
    registered = {n for n in metrics.TABLE if n.startswith(("gpu/", "host/"))}
    assert {metrics.get(name).name for name in made} == registered


def test_hints_name_the_quantity_and_what_it_does_not_show():
    clocks = {"time/data_s": 2.0, "time/fwd_bwd_s": 6.0, "time/eval_s": 1.0, "time/other_s": 1.0, "time/epoch_s": 9.0}
    memory, busy = gpu.hints(30.0, 12.0, [{"m": clocks}])
    assert "gpu/memory_util_avg 12 % < 20 %" in memory and "bandwidth is no limit" in memory
    assert "neither GB in use nor allocation" in memory
    assert "gpu/compute_util_avg 30 % < 50 %" in busy and "waiting for data 20 %" in busy
    assert "host gap at most 50 %" in busy and "100 % would be no praise" in busy
    assert gpu.hints(50.0, 20.0, []) == [] and gpu.hints(None, None, []) == []


A10G = {"resolved": {"amp": "bf16"}, "batch": {"world": 1, "accum": 1}, "software": {"driver": "550"}}
A10G["devices"] = [{"name": "NVIDIA A10G", "uuid": A}]


def told(busy, dram, tflops, weights_gib=0.1, manifest=A10G):
    """The verdict on 100 steps in 10 s; an A10G has 70 TFLOP/s and 600 GB/s."""
    m = {f"memory/{k}_gib": weights_gib for k in ("weights", "grads")} | {"memory/optimizer_gib": 2 * weights_gib}
    last = [{"m": m, "train_s": 10.0, "step": 100, "flops": tflops * 1e13}]
    return gpu.verdict(busy, dram, last, manifest, 300.0)


@pytest.mark.parametrize(
    ("case", "word"),
    [
        ((49, 90, 60), "input-or-host-limited"),
        ((99, 90, 42.1), "compute-limited"),
        ((99, 61, 41), "bandwidth-limited"),
        ((99, 39, 27), "latency-limited"),
        ((79, 39, 27), "undetermined"),
        ((99, 50, 27), "undetermined"),
        ((99, None, 10, 6.0), "bandwidth-limited"),  # 10 GiB-units x 6 GiB x 10 steps/s is 644 GB/s at least
        ((99, None, 10, 0.1), "undetermined"),  # a bound from below shows no room
        ((None, None, 10), "undetermined"),
    ],
)
def test_the_first_limit_that_fits_is_the_verdict(case, word, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert told(*case).startswith(f"{word}: ")


def test_a_verdict_prints_its_numbers_and_their_source(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    text = "busy 99 %, one process, 42 TFLOP/s, 60 % of peak, DRAM 39 %; peaks: datasheets of the makers, 2026-11"
    assert told(99, 39, 42) == f"compute-limited: {text}"
    other = {**A10G, "devices": [{"name": "Unknown 1", "uuid": A}]}
    assert "FLOP/s unknown" in told(99, None, 42, manifest=other) and "in no catalogue" in told(99, 1, 4, 1, other)


def test_measured_peaks_count_for_their_driver_and_power_cap_only(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place, peak = machine.peaks_file(), machine.Gpu(50.0, 25.0, 24, 500, 300)
    place.parent.mkdir()
    place.write_text(json.dumps({machine.peaks_key("NVIDIA A10G", "550", 300.0): peak._asdict()}))
    assert "84 % of peak" in told(99, 1, 42) and "measured by ablab machine bench" in told(99, 1, 42)
    for manifest, cap in (({**A10G, "software": {"driver": "560"}}, 300.0), (A10G, 250.0)):
        assert gpu.peaks(manifest, cap)[1] == machine.CATALOGUE
    place.write_text("{")
    assert machine.benched("NVIDIA A10G", "550", 300.0) is None


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A trial on two GPUs that a foreign process shares, one on a CPU, one without telemetry."""
    path = tmp_path_factory.mktemp("results")
    made = campaign.write(path, lambda arm, seed: 2.0, name="gpu", arms=(("R0", {}),), seeds=(1, 2, 3))
    for trial in made.trials():
        at = [r["t"] for r in rundir.rows(trial)]
        times = [at[0] + i * (at[-1] - at[0] + 1e-3) / 10 for i in range(1, 11)]
        file = {"trial": trial.name, "attempt": 1, "period_ms": 1000}
        if trial.record["seed"] == 3:
            continue
        out = rundir.Rows(trial.attempt(1).telemetry, "telemetry", file)
        for i, t in enumerate(times):
            devices = {
                d: {
                    "busy_pct": 10.0 * (i + 1),
                    "mem_busy_pct": 5.0,
                    "shared": d == B,
                    "throttle": ["power_cap"][: i % 2],
                }
                for d in (B, A)
            }
            out.line({"t": t, "devices": devices if trial.record["seed"] == 1 else {}, "host": {"rss_bytes": 1 << 30}})
        out.close()
    return path


def verb(results, *words, capsys):
    code = cli.main(["gpu", *words, f"O={results}"])
    return code, capsys.readouterr()


def test_the_verb_prints_devices_total_and_host(results, capsys):
    code, said = verb(results, "gpu/r0-s1", capsys=capsys)
    lines = said.out.splitlines()
    assert code == 0 and [line.split()[2] for line in lines[1:11]] == ["0"] * 3 + ["1"] * 3 + ["total"] * 3 + ["host"]
    busy = lines[1].split()
    assert busy[3:5] == ["gpu/compute_util_avg", "%"] and busy[5:] == ["55", "50", "10", "100", "100"]
    assert "r0-s1: device 0 device GPU-b" in said.out and "a foreign process used GPU-b" in said.out
    assert "hint: low memory activity" in said.out and "verdict: undetermined: busy 55 %" in said.out


def test_full_adds_throttling_per_reason(results, capsys):
    code, said = verb(results, "gpu/r0-s1", "FULL=1", capsys=capsys)
    assert code == 0 and "throttled by power_cap 50.0 % of the time" in said.out and "gpu/shared" in said.out


def test_without_a_gpu_values_are_absent_and_the_exit_is_0(results, capsys):
    code, said = verb(results, "gpu/r0-s2", "FORMAT=json", capsys=capsys)
    found = json.loads(said.out)
    assert code == 0 and {row["mean"] for row in found["table"] if row["device"] == "total"} == {None}
    assert [row["quantity"] for row in found["table"] if row["device"] == "host"] == ["host/ram_used_gib"]
    assert found["trials"][0]["verdict"] == "undetermined: no device was sampled"


def test_exit_codes(results, capsys):
    assert verb(results, "gpu/r0-s3", capsys=capsys)[0] == 1
    assert verb(results, "nope", capsys=capsys)[0] == 1
    assert verb(results, capsys=capsys)[0] == 2
    code, said = verb(results, "gpu/r0-s1", "gpu/r0-s2", "FORMAT=csv", capsys=capsys)
    assert code == 0 and said.out.startswith("campaign,trial,device,quantity,unit,mean") and "hint" not in said.out


def test_windows_of_a_trial_are_those_of_its_rows(results):
    (trial,) = query.resolve(results, ["gpu/r0-s1"])
    found = gpu.windows(gpu.recorded(trial))
    steps = [row["step"] for row in trial.rows()]
    assert found and {row["step"] for row in found} <= set(steps) and found[-1]["step"] == steps[-1]
