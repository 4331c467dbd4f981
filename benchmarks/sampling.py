# SPDX-License-Identifier: MIT
"""What the sampler of telemetry costs: its own process, over a trial that it takes for running, at 1 Hz."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from benchmarks import Figure


def sampler(folder: Path, seconds: float) -> list[Figure]:
    """CPU time of one sampler over `seconds`, its start apart, and what it takes of memory."""
    from ablab import configure, kconf, machine, plan, rundir
    from ablab.journal import Journal, owner

    here = machine.inventory()
    todo = plan.expand(configure.layers(kconf.ROOT, "tiny"), {"SEEDS": "1"}, here, name="tiny")
    data, check = {"name": "none", "sha256": "0" * 64, "tokens": None}, {"verdict": "skipped", "sha256": None}
    code = {"commit": None, "dirty": True, "patch": None, "tree": "0" * 64}
    content = plan.frozen(todo, name="bench", created="now", code=code, data=data, check=check)
    (trial,) = todo.trials
    campaign = rundir.Campaign.create(folder / "sampling", "bench", content, {trial.folder: trial.config})
    place = campaign.trial(trial.folder)
    lease = Journal.of(campaign).claim(place)
    said = {"state": "running", "phase": "train", "attempt": 1, "lease": lease["lease"], **owner(os.getpid())}
    said |= {"beat": 1, "progress": 1, "step": 1, "tokens": 0, "train_s": 0.0}
    place.write("status", said | {"devices": [d.uuid for d in here.devices]})
    me = f"{os.getpid()}:{machine.proc_start(os.getpid())}"
    command = [sys.executable, "-m", "ablab.sampler", str(campaign.path), me]
    with subprocess.Popen(command, cwd=kconf.ROOT) as process:
        try:
            mine = psutil.Process(process.pid)
            while not place.attempt(1).telemetry.exists():
                time.sleep(0.1)
            before, start = mine.cpu_times(), time.perf_counter()
            time.sleep(seconds)
            after, took, rss = mine.cpu_times(), time.perf_counter() - start, mine.memory_info().rss
        finally:
            process.terminate()
    share = 100 * (after.user + after.system - before.user - before.system) / took
    text = f"  one trial, {len(here.devices)} GPUs, {took:.0f} s, {rss / 2**20:.0f} MiB"
    return [Figure("telemetry: sampler", share, "% core", "<= 1", text)]
