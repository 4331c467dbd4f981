# SPDX-License-Identifier: MIT
"""Device inventory from recorded outputs of vendor tools and a copy of /sys, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ablab import machine
from ablab.machine import devices, inventory, proc_start

A100 = """GPU-2f5b7c1e-0d9a-4a55-8f0e-2b6f1c3d4e5a, NVIDIA A100-SXM4-40GB, 40960, Disabled
GPU-7c1e2f5b-9a0d-554a-0e8f-6f2b3d4e5a1c, NVIDIA A100-SXM4-40GB, 40960, Enabled
"""
A10G = "GPU-11111111-2222-3333-4444-555555555555, NVIDIA A10G, 23028, [N/A]\n"
LISTING = """GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-2f5b7c1e-0d9a-4a55-8f0e-2b6f1c3d4e5a)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-7c1e2f5b-9a0d-554a-0e8f-6f2b3d4e5a1c)
  MIG 3g.20gb     Device  0: (UUID: MIG-aaaaaaaa-0000-5000-8000-000000000001)
  MIG 1g.5gb      Device  1: (UUID: MIG-bbbbbbbb-0000-5000-8000-000000000002)
"""
GIB = 1 << 30


def nvidia(csv, root, listing=LISTING):
    """A machine with the NVIDIA driver whose nvidia-smi printed this."""
    (root / "proc/driver/nvidia").mkdir(parents=True)

    def run(argv):
        assert argv[0] == "nvidia-smi"
        return listing if argv[1] == "-L" else csv

    return run


def amd(root, *cards):
    """A machine with amdgpu and these cards: (PCI address, files)."""
    (root / "sys/module/amdgpu").mkdir(parents=True)
    (root / "sys/class/drm").mkdir(parents=True)
    for number, (address, files) in enumerate(cards):
        device = root / "sys/devices" / address
        device.mkdir(parents=True)
        for name, text in files.items():
            (device / name).write_text(text + "\n")
        (root / f"sys/class/drm/card{number}").mkdir()
        (root / f"sys/class/drm/card{number}/device").symlink_to(device)
        (root / f"sys/class/drm/card{number}-DP-1").mkdir()


def unused(argv):
    raise AssertionError(f"ran {argv}")


def test_nvidia_devices_come_by_uuid_and_a_sliced_one_as_its_slices(tmp_path):
    one, two, three = devices(nvidia(A100, tmp_path), tmp_path, {})
    assert one.uuid == "GPU-2f5b7c1e-0d9a-4a55-8f0e-2b6f1c3d4e5a" and one.kind == "cuda"
    assert one.memory_bytes == 40 * GIB and one.name == "NVIDIA A100-SXM4-40GB"
    assert (two.uuid, two.memory_bytes) == ("MIG-aaaaaaaa-0000-5000-8000-000000000001", 20 * GIB)
    assert (three.name, three.memory_bytes) == ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 5 * GIB)


def test_a_device_without_mig_is_a_device(tmp_path):
    (device,) = devices(nvidia(A10G, tmp_path), tmp_path, {})
    assert (device.name, device.memory_bytes) == ("NVIDIA A10G", 23028 << 20)


@pytest.mark.parametrize(
    "output",
    [
        "",
        "No devices were found\n",
        "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n",
        "GPU-1, NVIDIA X, [Insufficient Permissions], [N/A]\n",
    ],
)
def test_what_is_no_device_is_none(tmp_path, output):
    assert devices(nvidia(output, tmp_path), tmp_path, {}) == ()


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("0", [0]),
        ("2,0", [2, 0]),
        ("GPU-2f5b", [0]),
        ("MIG-bbbbbbbb-0000-5000-8000-000000000002", [2]),
        ("", []),
        ("-1", []),
        ("0,-1,1", [0]),
        ("NoDevFiles", []),
        ("MIG-", []),
        ("9", []),
    ],
)
def test_hidden_nvidia_devices_stay_hidden(tmp_path, value, kept):
    run = nvidia(A100, tmp_path)
    found = devices(run, tmp_path, {})
    assert list(devices(run, tmp_path, {"CUDA_VISIBLE_DEVICES": value})) == [found[i] for i in kept]


W7900 = {
    "vendor": "0x1002",
    "device": "0x744c",
    "mem_info_vram_total": str(48 * GIB),
    "unique_id": "9246a1b2c3d4e5f6",
}
W6800 = {**W7900, "unique_id": "00000000deadbeef", "product_name": "AMD Radeon PRO W6800"}
APU = {"vendor": "0x1002", "device": "0x164e", "mem_info_vram_total": str(GIB // 2)}
OTHER = {"vendor": "0x10de", "device": "0x2204"}


def test_amd_devices_come_from_the_kernel_in_pci_order(tmp_path):
    amd(
        tmp_path,
        ("0000:83:00.0", W7900),
        ("0000:03:00.0", W6800),
        ("0000:0c:00.0", APU),
        ("0000:01:00.0", OTHER),
    )
    one, two = devices(unused, tmp_path, {})
    assert (one.name, one.uuid) == ("AMD Radeon PRO W6800", "GPU-00000000deadbeef")
    assert (two.name, two.uuid, two.memory_bytes) == ("AMD 0x744c", "GPU-9246a1b2c3d4e5f6", 48 * GIB)
    assert {one.kind, two.kind} == {"rocm"}
    for variable in ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        assert devices(unused, tmp_path, {variable: "1"}) == (two,)
    assert devices(unused, tmp_path, {"ROCR_VISIBLE_DEVICES": two.uuid, "HIP_VISIBLE_DEVICES": "0"}) == (two,)


ROCM5 = {
    "card0": {
        "Unique ID": "0x9246a1b2c3d4e5f6",
        "VRAM Total Memory (B)": str(48 * GIB),
        "VRAM Total Used Memory (B)": "27574272",
        "Card series": "Radeon PRO W7900",
        "Card model": "0x0e0d",
    },
    "system": {"Driver version": "6.3.6"},
}
ROCM7 = {
    "card0": {
        "Unique ID": "0xdeadbeef",
        "VRAM Total Memory (B)": str(192 * GIB),
        "Card Series": "AMD Instinct MI300X",
    },
    "card1": {"Unique ID": "N/A", "VRAM Total Memory (B)": str(GIB)},
}


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (json.dumps(ROCM5), [("Radeon PRO W7900", "GPU-9246a1b2c3d4e5f6", 48 * GIB)]),
        (
            "WARNING: AMD GPU(s) is in a low-power state\n" + json.dumps(ROCM5),
            [("Radeon PRO W7900", ..., 48 * GIB)],
        ),
        (json.dumps(ROCM7), [("AMD Instinct MI300X", "GPU-00000000deadbeef", 192 * GIB)]),
        ("", []),
        ("{broken", []),
    ],
)
def test_rocm_smi_of_rocm_5_to_7_stands_in_for_the_kernel(tmp_path, output, expected):
    amd(tmp_path)
    found = devices(lambda argv: output, tmp_path, {})
    for device, (name, uuid, memory) in zip(found, expected, strict=True):
        assert (device.name, device.memory_bytes) == (name, memory) and uuid in (device.uuid, ...)


def test_no_gpu_is_an_empty_tuple_and_runs_nothing(tmp_path):
    found = inventory(unused, tmp_path, {})
    assert found.devices == () and found.host and found.boot_id and found.cpu
    assert found.cores == tuple(sorted(os.sched_getaffinity(0)))
    assert found.memory_bytes == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
    ("cpu", "count"),
    [("max 100000", None), ("100000 100000", 1), ("50000 100000", 1), ("99900000 100000", None)],
)
def test_a_container_gets_the_cores_and_memory_of_its_limits(tmp_path, cpu, count):
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text(cpu + "\n")
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("1048576\n")
    every = sorted(os.sched_getaffinity(0))
    assert list(machine.cores(tmp_path)) == every[:count] and machine.memory(tmp_path) == 1 << 20


def test_a_command_that_is_not_there_or_fails_prints_nothing():
    assert machine.command(["no-such-program-anywhere"]) == ""
    assert machine.command([sys.executable, "-c", "print('x'); exit(3)"]) == ""
    assert machine.command([sys.executable, "-c", "print('x')"]) == "x\n"


def test_the_start_of_a_process_tells_it_from_others():
    mine = proc_start(os.getpid())
    assert isinstance(mine, int) and mine == proc_start(os.getpid())
    assert proc_start(2**22 + 1) is None
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert proc_start(child.pid) >= mine
    child.communicate(b"\n")
    assert proc_start(child.pid) is None


def test_a_process_that_waits_to_be_reaped_is_gone():
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert Path(f"/proc/{child.pid}").exists() and proc_start(child.pid) is None
    assert child.wait() == 0


def test_a_name_with_blanks_and_brackets_does_not_confuse(tmp_path):
    script = tmp_path / "a) R 1 2 (b"
    script.symlink_to("/bin/cat")
    child = subprocess.Popen([str(script)], stdin=subprocess.PIPE)
    assert proc_start(child.pid) >= proc_start(os.getpid())
    child.communicate(b"")


def test_inventory_needs_no_torch_and_little_time():
    code = (
        "import sys, time; from ablab import machine; t = time.process_time(); machine.inventory();"
        " print('torch' in sys.modules, time.process_time() - t)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    loaded, seconds = out.stdout.split()
    # 30 ms are promised where there is no GPU; CPU time, so that neighbours do not count
    assert loaded == "False" and (float(seconds) < 0.03 or machine.inventory().devices)


@pytest.mark.parametrize(("text", "watts"), [("300.00\n", 300.0), ("[N/A]\n", None), ("", None)])
def test_the_power_cap_of_an_nvidia_gpu_is_asked_by_uuid(text, watts, tmp_path):
    gpu = machine.Device(kind="cuda", name="A10G", uuid="GPU-1", memory_bytes=1)
    asked = []
    assert machine.power_cap(gpu, lambda argv: asked.append(argv) or text, tmp_path) == watts
    assert "GPU-1" in asked[0]


def test_the_power_cap_of_an_amd_gpu_is_that_of_its_own_card(tmp_path):
    amd(tmp_path, ("0000:03:00.0", W7900), ("0000:83:00.0", W6800))
    for number, cap in enumerate(("241000000", "203000000")):
        folder = tmp_path / f"sys/class/drm/card{number}/device/hwmon/hwmon{number}"
        folder.mkdir(parents=True)
        (folder / "power1_cap").write_text(cap + "\n")
    found = devices(lambda argv: "", tmp_path, {})
    caps = {d.name: machine.power_cap(d, lambda argv: "", tmp_path) for d in found}
    assert sorted(caps.values()) == [203.0, 241.0] and caps[W6800["product_name"]] == 203.0
