# SPDX-License-Identifier: MIT
"""Children: their surroundings, their end, and the leases that keep two of them off one device."""

import os
import signal
import subprocess
import sys

import pytest

from ablab import machine
from ablab.run import local
from tests.run import drive

DEVICES = tuple(machine.Device(kind="cuda", name=f"gpu {n}", uuid=f"GPU-{n}", memory_bytes=1 << 30) for n in range(2))


def finish(child: local.Child) -> int | None:
    drive.wait(child.gone)
    return child.code()


def launch(tmp_path, target, server=None, **more):
    server = server or local.Server(("tests.run.targets",))
    return server.launch(f"tests.run.targets:{target}", str(tmp_path), log=tmp_path / "log.txt", **more)


@pytest.mark.parametrize("jobs", range(1, 10))
def test_core_sets_are_disjoint_as_long_as_there_are_cores(jobs):
    cores = (0, 1, 2, 3, 8, 9, 10, 11)
    sets = local.core_sets(cores, jobs)
    assert len(sets) == jobs and len({len(s) for s in sets}) == 1
    used = [c for s in sets for c in s]
    assert set(used) <= set(cores) and (len(used) == len(set(used))) == (jobs <= len(cores))


def test_a_child_has_its_session_streams_cores_and_variables(tmp_path):
    core = machine.cores()[-1]
    child = launch(tmp_path, "describe", cores=(core,), env={"CUDA_VISIBLE_DEVICES": "GPU-1"})
    assert finish(child) == 0
    text = (tmp_path / "log.txt").read_text().splitlines()
    assert text == [f"session {child.pid}", f"cores [{core}]", "devices GPU-1", "on stderr"]


def test_the_main_module_is_not_run_again(tmp_path):
    code = f"""
print("once", flush=True)
from pathlib import Path
from ablab.run import local
from tests.run import test_local
child = test_local.launch(Path({str(tmp_path)!r}), "describe")
test_local.finish(child)
"""
    (tmp_path / "script.py").write_text(code)
    env = {**os.environ, "PYTHONPATH": str(drive.ROOT)}
    done = subprocess.run([sys.executable, tmp_path / "script.py"], env=env, capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("once\n", "", 0)
    assert "once" not in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize(("target", "code"), [("seven", 7), ("die", -signal.SIGKILL), ("fail", 1)])
def test_the_exit_code_arrives(tmp_path, target, code):
    assert finish(launch(tmp_path, target)) == code


def test_a_stop_before_the_target_has_handlers_is_resumable(tmp_path):
    (tmp_path / "log.txt").touch()
    child = launch(tmp_path, "sleep")
    drive.wait(lambda: "ready" in (tmp_path / "log.txt").read_text())
    child.send(signal.SIGTERM)
    assert finish(child) == 75


def test_other_modules_need_another_server_and_leave_the_first_to_its_children(tmp_path):
    (tmp_path / "log.txt").touch()
    first = launch(tmp_path, "sleep")
    drive.wait(lambda: "ready" in (tmp_path / "log.txt").read_text())
    assert finish(launch(tmp_path, "seven", local.Server(("tests.run.targets", "colorsys")))) == 7
    assert not first.gone()
    first.send(signal.SIGTERM)
    assert finish(first) in (75, None)  # the first server ends with it and may not get to tell


def test_a_server_that_dies_is_an_error_with_a_remedy(tmp_path):
    server = local.Server(("tests.run.broken",))
    with pytest.raises(local.ChildError, match="see what is wrong with"):
        server.launch("tests.run.targets:seven", str(tmp_path), log=tmp_path / "log.txt")


def test_the_real_server_has_one_thread_and_starts_children_fast(tmp_path):
    server = local.Server()
    assert finish(launch(tmp_path, "threads", server)) == 0
    own, parent, torch = (tmp_path / "log.txt").read_text().split()
    assert (own, parent, torch) == ("1", "1", "True")


def test_a_device_is_leased_once(tmp_path):
    first, _ = local.lease(DEVICES, tmp_path)
    second, reasons = local.lease(DEVICES, tmp_path)
    third, holders = local.lease(DEVICES, tmp_path)
    assert first.env == {"CUDA_VISIBLE_DEVICES": "GPU-0"} and second.env == {"CUDA_VISIBLE_DEVICES": "GPU-1"}
    assert third is None and len(holders) == 2 and reasons == ["gpu 0 GPU-0: being leased"]
    first.release()
    assert local.lease(DEVICES, tmp_path)[0].device.uuid == "GPU-0"


def test_a_lease_outlives_its_runner_as_long_as_the_child_lives(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    held, _ = local.lease(DEVICES[:1], tmp_path)
    held.name(local.Child(child.pid, machine.proc_start(child.pid)), "campaign r1-s1")
    os.close(held._fd)  # as the kernel does when the runner is killed
    assert local.lease(DEVICES[:1], tmp_path) == (None, ["gpu 0 GPU-0: campaign r1-s1"])
    child.communicate()
    assert local.lease(DEVICES[:1], tmp_path)[0] is not None


def test_a_device_without_enough_memory_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "command", lambda argv: "100\n")
    assert local.lease(DEVICES[:1], tmp_path, 200 << 20) == (None, ["gpu 0 GPU-0: 100 MiB free, 200 needed"])
    assert local.lease(DEVICES[:1], tmp_path, 50 << 20)[0] is not None
