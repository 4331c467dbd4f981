# SPDX-License-Identifier: MIT
"""Campaigns of children without torch, and their runners: `python -m tests.run.drive VERB CAMPAIGN ..`."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ablab import configure, kconf, machine, plan, run
from ablab.journal import Journal, TrialState
from ablab.rundir import Campaign
from tests import sample

ROOT = Path(__file__).parents[2]
POLICY = {
    "keep_going": True,
    "retries": {"preempted": 100, "interrupted": 100, "dead": 1},
    "grace_s": 30,
    "hang_s": 60,
}
OPTIONS = {"target": "tests.run.child:main", "preload": ("tests.run.child",), "yes": True}


def options(**changes) -> run.Options:
    return run.Options(**{**OPTIONS, **changes})


def make(results: Path, wishes: list[dict], jobs: int = 2, name: str = "demo", **policy) -> Campaign:
    """A campaign whose trials train as `wishes` say."""
    content = sample.plan(len(wishes), policy={**POLICY, "jobs": jobs, **policy})
    content["code"]["tree"] = run.provenance.tree()
    names = [f"{t['id']}-{t['hash'][:8]}" for t in content["trials"]]
    configs = {n: json.dumps(w) + "\nCONFIG_TRAIN_CKPT_KEEP=2\n" for n, w in zip(names, wishes, strict=True)}
    return Campaign.create(results, name, content, configs)


def real(results: Path, target: str, **variables: str) -> tuple[plan.Plan, run.Options]:
    """A plan of trials that really train, 50 steps each, and the options to run it with."""
    asked = {"SEEDS": "2", "JOBS": "2", "CONFIG_DATA_DIR": str(results.parent / "data"), **variables}
    todo = plan.expand(configure.layers(kconf.ROOT, "tiny"), asked, machine.inventory(), name="tiny")
    return todo, run.Options(yes=True, results=results, target=target, checker="tests.run.targets:passes")


def states(campaign: Campaign) -> list[str]:
    entries = Journal.of(campaign).replay()
    return [str(entries.entry(n).state) for n in campaign.records()]


def attempts(campaign: Campaign) -> list[int]:
    return [len(t.attempts()) for t in campaign.trials()]


def weights(campaign: Campaign) -> list[str]:
    """What each trial ended with."""
    return [t.summary()["model"]["fingerprint"] for t in campaign.trials()]


def popen(verb: str, path: Path, *arguments: str, group: bool = False) -> subprocess.Popen:
    """A runner as a process, on request in its own process group; arguments like `last_s=0.2` are options."""
    command = [sys.executable, "-m", "tests.run.drive", verb, str(path), *arguments]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, process_group=0 if group else None, **pipe)


@contextmanager
def pause(seconds: float) -> Iterator[None]:
    """Let `seconds` pass: a random moment for a fault, never something that a test waits for."""
    time.sleep(seconds)
    yield


def wait(condition, limit_s: float = 20.0) -> None:
    """Wait until a condition holds; fails loudly after `limit_s`."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def running(campaign: Campaign) -> list[int]:
    """Pids of the children that train now."""
    found = []
    for trial, state in zip(campaign.trials(), states(campaign), strict=True):
        status, lease = trial.status(), trial.lease()
        if state == TrialState.RUNNING and status and status["lease"] == lease["lease"] and status["step"]:
            found.append(status["pid"])
    return found


def victims(campaign: Campaign) -> list[int]:
    """Children that train, once there are some; none when the campaign is over."""
    while not (found := running(campaign)) and set(states(campaign)) != {"done"}:
        time.sleep(0.01)
    return found


def kill(pid: int) -> None:
    """SIGKILL, if it is still there."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def main(verb: str, path: str, *arguments: str) -> int:
    if verb == "start":
        return run.start(*real(Path(path), *arguments))
    changes = {name: float(value) for name, value in (a.split("=") for a in arguments)}
    return run.resume(Campaign.open(Path(path)), options(**changes))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
