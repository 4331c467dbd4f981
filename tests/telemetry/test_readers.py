# SPDX-License-Identifier: MIT
"""Readers on recorded machines: right device, right units, absent and not 0 where nothing was measured."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from ablab import machine, record
from ablab.telemetry import HOST, _tape, foreign, number
from ablab.telemetry.host import Host
from tests.telemetry import replay

PID = 4242
KEYS = {
    "period_s",
    "used_bytes",
    "dram_pct",
    "busy_pct",
    "mem_mhz",
    "mem_busy_pct",
    "energy_j",
    "temp_c",
    "throttle",
    "shared",
    "total_bytes",
    "sm_mhz",
    "sm_pct",
    "limit_w",
    "tensor_pct",
    "power_w",
    "own_bytes",
}


def read(name, tmp_path, device=None, pids=(PID,), times=1):
    found = replay.load(name)
    readers = replay.readers(found, tmp_path)
    for _ in range(times):
        got = [r for reader in readers if (r := reader.sample(device or found["devices"][0], pids)) is not None]
    return got[0] if got else None


@pytest.mark.parametrize("name", replay.NAMES)
def test_every_machine_is_read_with_the_same_keys(name, tmp_path):
    found = replay.load(name)
    readers = replay.readers(found, tmp_path)
    got = {d: [r for x in readers if (r := x.sample(d, (PID,))) is not None] for d in found["devices"]}
    assert all(len(known) == 1 for known in got.values())
    for (reading,) in got.values():
        assert reading.keys() <= KEYS and reading["total_bytes"] > 1 << 33
        numbers = [v for v in reading.values() if isinstance(v, int | float)]
        assert all(math.isfinite(v) and v >= 0 for v in numbers)
        assert reading["used_bytes"] <= reading["total_bytes"]


@pytest.mark.parametrize("name", replay.NAMES)
def test_a_foreign_device_belongs_to_no_reader(name, tmp_path):
    assert read(name, tmp_path, "GPU-00000000-dead-beef-0000-000000000000") is None
    assert read(name, tmp_path / "b", "0") is None, "an index is no identity"


def test_a_machine_without_a_gpu_has_nothing_to_read(tmp_path):
    readers = replay.readers(replay.load("none"), tmp_path)
    assert [r.sample("GPU-5a1f0c7e-2b3d-4e5f-8a9b-0c1d2e3f4a5b", ()) for r in readers] == [None] * 4


def test_one_nvidia_gpu(tmp_path):
    got = read("nvml-1", tmp_path, times=2)
    assert got == {
        "busy_pct": 97.0,
        "mem_busy_pct": 61.0,
        "used_bytes": 18253611008.0,
        "total_bytes": 24146608128.0,
        "own_bytes": 17179869184.0,
        "shared": False,
        "power_w": pytest.approx(287.412),
        "limit_w": pytest.approx(300.0),
        "energy_j": pytest.approx(912632.0),
        "temp_c": 71.0,
        "sm_mhz": 1410.0,
        "mem_mhz": 6250.0,
        "throttle": ["power_cap"],
    }


def test_devices_are_found_whatever_their_order(tmp_path):
    found = replay.load("nvml-4")
    nvml, *_ = replay.readers(found, tmp_path)
    busy = {d: nvml.sample(d, (PID,))["busy_pct"] for d in reversed(found["devices"])}
    assert [busy[d] for d in found["devices"]] == [99, 12, 88, 0]


def test_foreign_processes_and_reasons_are_told_apart(tmp_path):
    found = replay.load("nvml-4")
    nvml, *_ = replay.readers(found, tmp_path)
    got = [nvml.sample(d, (PID,)) for d in found["devices"]]
    assert [g.get("shared") for g in got] == [False, None, True, False], "one process that is not ours may be us"
    assert [g["throttle"] for g in got] == [["power_cap", "sw_thermal"], [], [], []], "idle is no throttling"
    assert [g.get("own_bytes") for g in got] == [40 << 30, None, 20 << 30, None]


def test_hardware_counters_come_from_the_second_reading_on(tmp_path):
    assert "dram_pct" not in read("nvml-4", tmp_path)
    got = read("nvml-4", tmp_path / "b", times=2)
    assert (got["sm_pct"], got["tensor_pct"], got["dram_pct"]) == (81.5, 44.25, 52.0)


def test_a_slice_has_its_own_memory_and_nothing_of_the_whole_device(tmp_path):
    got = read("nvml-mig", tmp_path)
    assert got == {
        "used_bytes": 12412802048,
        "total_bytes": 42412802048,
        "own_bytes": 12000000000,
        "shared": False,
    }


def test_what_is_refused_or_all_ones_is_absent(tmp_path):
    got = read("nvml-no-permission", tmp_path)
    assert got.keys() == {"busy_pct", "mem_busy_pct", "used_bytes", "total_bytes", "temp_c"}


def test_amdsmi(tmp_path):
    got = read("amdsmi", tmp_path)
    assert (got["power_w"], got["limit_w"], got["sm_mhz"], got["mem_mhz"]) == (702, 750, 2098, 1300)
    assert got["energy_j"] == pytest.approx(6543210000 * 15.259e-6) and got["throttle"] == ["power_cap"]
    assert got["total_bytes"] == 196288 << 20 and got["own_bytes"] == 80 << 30 and got["shared"] is False
    second = read("amdsmi", tmp_path / "b", "GPU-1122334455667788")
    absent = {"mem_busy_pct", "energy_j", "throttle", "mem_mhz", "own_bytes"}
    assert not absent & second.keys() and (second["power_w"], second["limit_w"], second["busy_pct"]) == (139, 750, 0)
    assert read("amdsmi", tmp_path / "c", "0000:22:00.0") == second, "by PCI address too"


def test_sysfs(tmp_path):
    got = read("sysfs", tmp_path)
    assert (got["power_w"], got["temp_c"], got["sm_mhz"]) == (pytest.approx(241), 79, pytest.approx(2482))
    assert got["own_bytes"] == 19531250 << 10, "two descriptors of one client, and one of another device"
    assert got["shared"] is False and "throttle" not in got
    assert read("sysfs", tmp_path / "b", pids=(1,)).get("shared") is None
    assert read("sysfs", tmp_path / "c", "0000:03:00.0") == got


@pytest.mark.parametrize("name", ["rocm-smi-5", "rocm-smi-6", "rocm-smi-7", "amd-smi-6", "amd-smi-7"])
def test_commands_of_all_releases_tell_the_same(name, tmp_path):
    got = read(name, tmp_path)
    same = (got["busy_pct"], got["power_w"], got["temp_c"], got["sm_mhz"], got["mem_mhz"], got["period_s"])
    assert same == (91, 388, 61, 1700, 1600, 30)
    assert got.get("mem_busy_pct") == (None if name == "rocm-smi-7" else 44), "allocated memory is no activity"
    if name.startswith("amd"):
        assert got.get("throttle") == (["throttled"] if name == "amd-smi-6" else None)


def test_a_slow_command_runs_twice_a_minute(tmp_path):
    found, asked = replay.load("rocm-smi-5"), []
    reader = replay.readers(found, tmp_path)[3]
    run = reader._run
    reader._run = lambda command: asked.append(command) or run(command)
    for _ in range(3):
        assert reader.sample(found["devices"][0], ())
    assert len(asked) == 4  # amd-smi three times in vain, then rocm-smi


@pytest.mark.parametrize("value", ["N/A", None, "", 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF, float("nan"), -1, {}])
def test_no_value_is_none_and_never_0(value):
    assert number(value) is None


def test_zero_is_a_value():
    assert number(0) == 0.0 and number("0") == 0.0


@pytest.mark.parametrize(
    ("users", "pids", "shared"),
    [(None, (1,), None), ((), (1,), False), ((1,), (1, 2), False), ((1, 3), (1,), True), ((7,), (1,), None)]
    + [((7, 8), (1,), True)],
)
def test_who_uses_a_device(users, pids, shared):
    assert foreign(users, pids) is shared


BURN = "import os, time\nchild = os.fork()\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass\n"
BURN += "if child:\n print(child, flush=True)\n input()\n os.kill(child, 9)\nelse:\n time.sleep(60)"


def test_cpu_time_and_memory_are_those_of_the_process_tree():
    host = Host(None, None)
    assert host.sample("GPU-x", (os.getpid(),)) is None
    with subprocess.Popen([sys.executable, "-c", BURN], stdin=-1, stdout=-1, text=True) as process:
        try:
            first = host.sample(HOST, (process.pid,))
            assert "cpu_s" not in first and first["rss_bytes"] > 0  # it has only begun
            child = int(process.stdout.readline())
            used = 0.0
            while used < 0.25:
                got = host.sample(HOST, (process.pid, child))
                used += got["cpu_s"]
                assert got["loader_cpu_s"] <= got["cpu_s"] and got["rss_bytes"] > 1 << 20
        finally:
            process.communicate("\n")
    assert host.sample(HOST, (process.pid,)) == {}


def test_a_recording_is_read_back_and_names_nobody(tmp_path):
    """The recorder runs over a machine of files and commands, and what it wrote is a fixture."""
    source = replay.load("sysfs")
    root = replay.lay(source, tmp_path / "a")
    (root / "sys/module/amdgpu").mkdir(parents=True)
    text = _tape.record(root, lambda command: "")
    assert "a1b2c3d4e5f607" not in text.lower() and str(int("a1b2c3d4e5f607", 16)) not in text
    found = json.loads(text)
    assert found["schema"] == source["schema"] and found["nvml"]["nvmlInit"] and len(found["devices"]) == 1
    was = replay.readers(source, tmp_path / "b")[2].sample(source["devices"][0], ())
    got = replay.readers(found, tmp_path / "c")[2].sample(found["devices"][0], ())
    assert got == {k: v for k, v in was.items() if k not in ("own_bytes", "shared")}


def test_a_tape_of_a_library_replays_the_same_readings(tmp_path):
    found = replay.load("nvml-4")
    tape = _tape.Tape(replay.readers(found, tmp_path)[0].library)
    nvml = replay.Nvml(None, None, tape)
    device = found["devices"][0]
    said = [nvml.sample(device, (PID,)) for _ in range(2)]
    calls = json.loads(json.dumps(tape.calls))
    again = replay.Nvml(None, None, replay.Library(calls, replay.pynvml, replay.pynvml.NVMLError))
    assert [again.sample(device, (PID,)) for _ in range(2)] == said


def test_a_command_that_is_not_there_says_nothing():
    assert machine.command(["amd-smi", "metric", "--json"]) == ""


def test_a_manifest_names_the_device_that_torch_computes_on(monkeypatch):
    """Whatever else is visible, in whatever order; where the names differ, all that is visible."""
    names = ["GPU-5a1f0c7e-2b3d-4e5f-8a9b-0c1d2e3f4a5b", "MIG-7c9e6679-7425-40de-944b-e07fc1f90ae7"]
    found = [machine.Device(kind="cuda", name="x", uuid=n, memory_bytes=1) for n in names]
    for asked, mine in ((names[1][4:], [found[1]]), (names[0][4:].upper(), [found[0]]), ("37383930", found)):
        told = replay.SimpleNamespace(uuid=asked)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, told=told: told)
        assert record.opened(found, torch.device("cuda")) == mine
