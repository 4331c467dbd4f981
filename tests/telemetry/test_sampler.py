# SPDX-License-Identifier: MIT
"""The sampler: one process a campaign, beside the trainers; killing anything costs at most a gap."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ablab import journal, machine, rundir, sampler
from ablab.journal import Journal
from ablab.telemetry import HOST, Telemetry
from ablab.telemetry.nvml import Nvml
from tests import sample
from tests.run import drive
from tests.telemetry import replay

ON = "CONFIG_TELEM_HOST=y\nCONFIG_TELEM_PERIOD_MS=100\n"
LONG = {"steps": 100000, "step_s": 0.02, "every": 50}


def make(results: Path, wishes: list[dict], config: str = ON, **policy) -> rundir.Campaign:
    """A campaign of children without torch, whose configuration says what is sampled."""
    content = sample.plan(len(wishes), policy={**drive.POLICY, "jobs": 2, **policy})
    content["base"]["config"] = config
    names = [rundir.folder_of(t) for t in content["trials"]]
    configs = {n: json.dumps(w) + "\nCONFIG_TRAIN_CKPT_KEEP=2\n" for n, w in zip(names, wishes, strict=True)}
    return rundir.Campaign.create(results, "demo", content, configs)


def lines(trial, attempt=1):
    return list(rundir.lines(trial.attempt(attempt).telemetry, "telemetry"))


def samplers(campaign) -> list[int]:
    """Pids of the samplers of a campaign."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if "ablab.sampler" in words and str(campaign.path) in words:
            found.append(int(folder.name))
    return found


def gone(pid: int) -> bool:
    return machine.proc_start(pid) is None


def claimed(campaign, pid: int, devices=()):
    """The first trial, running in process `pid`, as its status says."""
    trial = campaign.trials()[0]
    lease = Journal.of(campaign).claim(trial)
    trial.write("status", sample.status(trial, {**lease, **journal.owner(pid)}, devices=list(devices)))
    return trial


class Fake(Telemetry):
    """Knows one device; `slow` is read every so many seconds."""

    def __init__(self, device, slow=0.0):
        super().__init__(None, None)
        self.device, self.every_s = device, slow

    def sample(self, device, pids):
        return {"busy_pct": 50.0} if device == self.device else None


def test_a_trial_is_sampled_on_the_devices_that_it_opened(tmp_path):
    """Four are visible; the trial names two of them, last first."""
    found = replay.load("nvml-4")
    reader = Nvml(None, None, replay.Library(found["nvml"], replay.pynvml, replay.pynvml.NVMLError))
    mine = [found["devices"][2], found["devices"][0]]
    trial = claimed(make(tmp_path, [{}]), os.getpid(), mine)
    made = sampler.Sampler(trial.campaign, [reader, Fake(HOST)], 1.0)
    assert made.tick() == 1
    made.close()
    header, row = lines(trial)
    assert header["schema"] == "ablab.telemetry/1" and (header["attempt"], header["period_ms"]) == (1, 1000)
    assert list(row["devices"]) == mine and [d["busy_pct"] for d in row["devices"].values()] == [88, 99]
    assert row["host"] == {"busy_pct": 50.0} and row["devices"][mine[0]]["shared"] is True


def test_the_first_reader_that_knows_a_device_serves_it(tmp_path):
    trial = claimed(make(tmp_path, [{}]), os.getpid(), ["GPU-a", "GPU-b"])
    clock = iter(range(0, 1000, 10))
    made = sampler.Sampler(trial.campaign, [Fake("GPU-x"), Fake("GPU-a", slow=30.0)], 10.0, lambda: next(clock))
    for _ in range(4):
        made.tick()
    made.close()
    seen = [bool(row["devices"]) for row in lines(trial)[1:]]
    assert seen[0] and sum(seen) < len(seen), "a slow reading is written once"
    assert all("GPU-b" not in row["devices"] for row in lines(trial)[1:])


def test_only_processes_of_this_boot_are_sampled(tmp_path):
    trial = claimed(make(tmp_path, [{}]), os.getpid())
    status = trial.status()
    made = sampler.Sampler(trial.campaign, [Fake(HOST)], 1.0)
    for change in ({"boot_id": "other"}, {"host": "other"}, {"proc_start": 1}, {"pid": 2**22 + 1}):
        trial.write("status", {**status, **change})
        assert made.tick() == 0
    trial.write("status", status)
    assert made.tick() == 1
    made.close()


def test_a_further_attempt_has_its_own_file_and_a_second_sampler_appends(tmp_path):
    trial = claimed(make(tmp_path, [{}]), os.getpid())
    for _ in range(2):
        made = sampler.Sampler(trial.campaign, [Fake(HOST)], 1.0)
        assert made.tick() == 1
        made.close()
    assert [("schema" in row) for row in lines(trial)] == [True, False, False]


def test_a_full_disk_is_a_gap(tmp_path, monkeypatch):
    trial = claimed(make(tmp_path, [{}]), os.getpid())
    made = sampler.Sampler(trial.campaign, [Fake(HOST)], 1.0)
    made.tick()

    def full(self, payload):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(rundir.Rows, "line", full)
        assert made.tick() == 1
    made.tick()
    made.close()
    assert len(lines(trial)) == 3


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ("CONFIG_TELEM_NONE=y\n", ["None_"]),
        ("CONFIG_TELEM_HOST=n\nCONFIG_TELEM_NVML=y\nCONFIG_TELEM_PERIOD_MS=250\n", ["Nvml"]),
        ("CONFIG_TELEM_NVML=y\nCONFIG_TELEM_SYSFS=y\nCONFIG_TELEM_HOST=y\nCONFIG_TELEM_PERIOD_MS=250\n", None),
    ],
)
def test_knobs_select_readers_in_order_of_preference(config, names):
    if config.startswith("CONFIG_TELEM_NONE"):
        from ablab.run._sampling import READER

        assert not READER.search(config) and READER.search(ON)
        return
    made, period_s = sampler.members(config)
    assert [type(m).__name__ for m in made] == (names or ["Nvml", "Sysfs", "Host"]) and period_s == 0.25


def test_a_runner_starts_it_and_ends_it(tmp_path):
    campaign = make(tmp_path, [{"steps": 60, "step_s": 0.02}] * 2)
    runner = drive.popen("continue", campaign.path)
    drive.wait(lambda: len(samplers(campaign)) == 1)
    (pid,) = samplers(campaign)
    runner.communicate()
    assert gone(pid) and campaign.sampler_log.read_text() == ""
    for trial in campaign.trials():
        header, *rows = lines(trial)
        assert rows and max(row["host"]["rss_bytes"] for row in rows) > 1 << 20  # at its end a process has none
        assert [r["t"] for r in rows] == sorted(r["t"] for r in rows)
        assert trial.done(), "telemetry is nothing that DONE waits for"


def test_without_telemetry_there_is_no_process(tmp_path):
    campaign = make(tmp_path, [{}], "CONFIG_TELEM_NONE=y\n")
    runner = drive.popen("continue", campaign.path)
    runner.communicate()
    assert runner.returncode == 0
    assert not campaign.sampler_log.exists() and not campaign.trials()[0].attempt(1).telemetry.exists()


def test_it_survives_its_runner_and_ends_with_the_trials(tmp_path):
    campaign = make(tmp_path, [LONG])
    runner = drive.popen("continue", campaign.path)
    drive.wait(lambda: drive.running(campaign) and len(lines(campaign.trials()[0])) > 2)
    (pid,), (trainer,) = samplers(campaign), drive.running(campaign)
    runner.kill()
    runner.communicate()
    before = len(lines(campaign.trials()[0]))
    drive.wait(lambda: len(lines(campaign.trials()[0])) > before + 2)
    assert not gone(pid)
    drive.kill(trainer)
    drive.wait(lambda: gone(pid))


def test_it_survives_a_killed_trial_and_is_started_again_when_killed(tmp_path):
    campaign = make(tmp_path, [LONG, {"steps": 4, "mode": "die"}], retries={"dead": 0})
    runner = drive.popen("continue", campaign.path)
    first = campaign.trials()[0]
    drive.wait(lambda: drive.states(campaign)[1] == "failed" and len(lines(first)) > 2)
    (pid,) = samplers(campaign)
    drive.kill(pid)
    drive.wait(lambda: samplers(campaign) not in ([], [pid]))
    before = len(lines(first))
    drive.wait(lambda: len(lines(first)) > before + 1)
    damage: list[str] = []
    rows = list(rundir.lines(first.attempt(1).telemetry, "telemetry", damage))
    assert not damage and ["schema" in r for r in rows].count(True) == 1
    (pid,) = samplers(campaign)
    runner.send_signal(signal.SIGTERM)
    runner.communicate()
    assert gone(pid)


def test_two_samplers_of_a_host_never_write_together(tmp_path):
    """The second one waits, and takes over."""
    campaign = make(tmp_path, [{}])
    trial = claimed(campaign, os.getpid())
    me = f"{os.getpid()}:{machine.proc_start(os.getpid())}"
    command = [sys.executable, "-m", "ablab.sampler", str(campaign.path), me]
    one = subprocess.Popen(command, cwd=drive.ROOT)
    try:
        drive.wait(lambda: len(lines(trial)) > 2)
        two = subprocess.Popen(command, cwd=drive.ROOT)
        try:
            drive.wait(lambda: "locks_lock" in wchan(two.pid) or len(lines(trial)) > 12)
            one.kill()
            one.wait()
            before = len(lines(trial))
            drive.wait(lambda: len(lines(trial)) > before + 2)
            assert two.poll() is None and ["schema" in row for row in lines(trial)].count(True) == 1
        finally:
            two.terminate()
            assert two.wait() == 0
    finally:
        one.kill()


def wchan(pid: int) -> str:
    """Where a process waits in the kernel."""
    try:
        return Path(f"/proc/{pid}/wchan").read_text()
    except OSError:
        return ""
