# SPDX-License-Identifier: MIT
"""A trial without torch: JSON for a configuration, a hash chain over the steps for weights, real files."""

import hashlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from ablab import journal
from ablab.rundir import AttemptDir, Rows, SupersededError, publish
from tests import sample

ZERO = "0" * 64


def main(path: str) -> int:
    """Train: `steps` steps of `step_s`, a checkpoint every `every`, an end as `mode` says."""
    attempt = AttemptDir.open(Path(path))
    stopped: list[int] = []
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, lambda n, _: stopped.append(n))
    trial = attempt.trial
    text = trial.config.read_text()
    wishes = json.loads(text.partition("\n")[0]) if text.startswith("{") else {}
    want = {"steps": 6, "step_s": 0.0, "every": 2, "mode": "ok", **wishes}
    lease = trial.lease()
    assert lease["attempt"] == attempt.number
    beat = _Beat(trial, lease)
    try:
        code, end = _train(attempt, want, lease, stopped, beat)
    except SupersededError as error:
        code, end = 75, {"state": "interrupted", "class": "lost", "message": str(error)}
    except Exception as error:
        code, end = 1, {"state": "failed", "class": "exception", "message": repr(error)}
        print(f"a line of the log before the end: {error!r}", file=sys.stderr)
    beat.end()
    attempt.write("exit", {"class": None, "code": code, "step": beat.step, **end})
    return code


class _Beat:
    """status.json, as a trial writes it."""

    def __init__(self, trial, lease) -> None:
        self.trial, self.lease, self.step, self.beats = trial, lease, 0, 0
        self.over = threading.Event()
        trial.supersede(lease["lease"])
        self.write()
        self.thread = threading.Thread(target=self._loop, daemon=True)
        self.thread.start()

    def _loop(self) -> None:
        while not self.over.wait(0.2):
            self.write()

    def write(self) -> None:
        self.beats += 1
        now = sample.status(self.trial, {**self.lease, **journal.owner(os.getpid())}, self.beats)
        self.trial.write("status", now | {"progress": self.step, "step": self.step, "tokens": self.step * 10})

    def end(self) -> None:
        self.over.set()
        self.thread.join()


def _train(attempt, want, lease, stopped, beat):
    trial, weights, first = attempt.trial, ZERO, 0
    for saved in [] if lease["fresh"] else trial.saved(lease["first"]):
        if not saved.flaw():
            weights, first = saved.read("state")["weights"], saved.step
            break
    header = {"trial": trial.name, "attempt": attempt.number, "resumed_at_step": first}
    rows = Rows(attempt.metrics, "metrics", header)
    _record(attempt, lease, trial)
    if want["mode"] == "cores":
        print("cores", ",".join(map(str, sorted(os.sched_getaffinity(0)))))
        want["mode"] = "ok"
    for step in range(first + 1, want["steps"] + 1):
        weights = hashlib.sha256(f"{trial.record['hash']} {step} {weights}".encode()).hexdigest()
        rows.row(
            step,
            {"train_loss": 1.0 / step},
            tokens=step * 10,
            train_s=float(step),
            wall_s=float(step),
            flops=0.0,
        )
        beat.step = step
        if want["mode"] != "ok" and step == want["steps"] // 2:
            return _trouble(want["mode"], attempt, stopped)
        if step % want["every"] == 0 or stopped or step == want["steps"]:
            _save(trial, step, attempt.number, weights, lease)
            print(f"saved step {step}")
        if stopped:
            return 75, {
                "state": "preempted",
                "class": "signal",
                "message": f"signal {stopped[0]}, saved step {step}",
            }
        time.sleep(want["step_s"])
    rows.close()
    summary = sample.summary(trial, lease, loss=int(weights[:8], 16) / 2**32)
    summary["model"]["fingerprint"] = weights
    trial.write("summary", summary, guard=trial.guard(lease["lease"]))
    publish(trial, attempt.number, lease["lease"])
    return 0, {"state": "done", "message": "budget"}


def _trouble(mode, attempt, stopped):
    if mode == "nan":
        return 1, {"state": "diverged", "class": "diverged", "message": "train_loss is nan at step 3"}
    if mode == "oom":
        return 1, {"state": "oom", "class": "oom", "message": "out of memory: 40 GiB asked for"}
    if mode == "raise":
        raise RuntimeError("planted")
    if mode == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "hang":
        while not stopped:
            time.sleep(0.05)
        return 75, {"state": "preempted", "class": "signal", "message": "saved"}
    if mode == "deaf":
        while True:
            time.sleep(60)
    raise AssertionError(mode)


def _save(trial, step, number, weights, lease) -> None:
    checkpoint = trial.checkpoint(step, number)
    temporary = checkpoint.begin()
    temporary.write("state", {"weights": weights})
    temporary.seal()
    checkpoint.commit(temporary, trial.guard(lease["lease"]))


def _record(attempt, lease, trial) -> None:
    content, guard = sample.manifest(trial, lease), trial.guard(lease["lease"])
    attempt.write("manifest", content)
    trial.write("manifest", content, guard=guard)
    trial.write("built", {"attempt": attempt.number}, guard=guard)
