# SPDX-License-Identifier: MIT
"""`tracker test`: a made-up trial goes to a tracker, the worker is killed on the way, and what arrived is compared."""

import math
import os
import signal
import struct
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ablab import configure, kconf, machine, plan, provenance
from ablab.journal import Journal, TrialState
from ablab.rundir import Campaign, Rows, TrialDir
from ablab.track import _feed, _mirror

ROWS, KILL_AT = 60, 25
PROJECT = "ablab-tracker-test"


def main(name: str, module: str) -> int:
    """0 if every row is there once, 1 if not, 2 if the tracker cannot be used.  Prints a line for each."""
    with tempfile.TemporaryDirectory(prefix="ablab-") as folder:
        trial = made_up(Path(folder), name)
        values = _mirror.values_of([name], trial.campaign.content["base"]["config"])
        member = _mirror.made(name, values)
        try:
            member.ready()
        except ValueError as error:
            print(f"{name}: {error}")
            return 2
        child = _mirror._Child(trial.campaign, name, module)
        try:
            child.look(end=False)
            _until(lambda: _feed.Cursor(child.files).total() >= KILL_AT or child.process.poll() is not None)
            os.killpg(child.process.pid, signal.SIGKILL)
            child.process.wait()
            print(f"{name}: killed with {_feed.Cursor(child.files).total()} of {ROWS} rows delivered")
            known = child.files.cursor.read_bytes().splitlines(keepends=True)
            child.files.cursor.write_bytes(b"".join(known[:-1]))  # as if it had died before it could note the last ones
            write(trial, KILL_AT + 5, ROWS)
        finally:
            child.kill()
        code = _mirror.supervise(trial.campaign, [name], module, once=True)
        if code:
            print(f"{name}: {(child.files.state() or {}).get('error')}")
            return 1
        run = _feed.run_of(trial, child.files, 1, "open")
        return compare(name, trial, member.fetch(member.address(run))[1])


def compare(name: str, trial: TrialDir, found: list[dict[str, Any]]) -> int:
    """Print what differs between a trial and what a tracker has; 1 if anything does."""
    wanted = [_feed.payload(row, mark, None) for mark, _, row in read_all(trial)]
    same = [alike(w, f) for w, f in zip(wanted, found, strict=False)]
    wrong = len(same) - sum(same) + abs(len(wanted) - len(found))
    print(f"{name}: {len(found)} rows read back, {wrong} differ from the {len(wanted)} that were written")
    return int(wrong > 0)


def read_all(trial: TrialDir) -> list[Any]:
    feed, found = _feed.Feed(trial, {}), []
    while rows := feed.read(1000):
        found += rows
    feed.close()
    return found


def alike(wanted: Mapping[str, float], found: Mapping[str, Any]) -> bool:
    """True if all that was sent is there, as a number of 64 or of 32 bits."""

    def same(a: float, b: Any) -> bool:
        b = float("nan") if b in (None, "NaN") else b
        return b == a or (math.isnan(a) and math.isnan(b)) or b == struct.unpack("f", struct.pack("f", a))[0]

    return all(name in found and same(value, found[name]) for name, value in wanted.items())


def made_up(folder: Path, name: str) -> TrialDir:
    """A trial that seems to run, with KILL_AT rows and a few more."""
    variables = {"CONFIG_TRACK_PROJECT": PROJECT}
    todo = plan.expand(configure.layers(kconf.ROOT, "tiny"), variables, machine.inventory(), name="tracker-test")
    content = plan.frozen(
        todo,
        name="tracker-test",
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        code=provenance.code() | {"patch": None},
        data={"name": "none", "sha256": "0" * 64, "tokens": None},
        check={"verdict": "skipped", "sha256": None},
    )
    campaign = Campaign.create(folder, "tracker-test", content, {t.folder: t.config for t in todo.trials})
    trial, *_ = campaign.trials()
    assert Journal.of(campaign).claim(trial)
    write(trial, 0, KILL_AT + 5)
    return trial


def write(trial: TrialDir, first: int, last: int) -> None:
    """Append rows to its attempt, one with a value that is not finite; the trial is done with the last one."""
    (attempt,) = trial.attempts()
    rows = Rows(attempt.metrics, "metrics", {"trial": trial.name, "attempt": 1, "resumed_at_step": 0})
    for q in range(first, last):
        m = {"train_loss": math.nan if q == KILL_AT else 4 / (q + 1), "learning_rate": 1e-3}
        axes = {"tokens": 64 * q, "train_s": q / 7, "wall_s": q / 5, "flops": 1e9 * q}
        rows.line(
            {"q": q, "t": 0.0, "step": 10 * q, **axes, "m": {**m, **({"train_loss": None} if q == KILL_AT else {})}}
        )
    rows.close()
    if last == ROWS:
        assert Journal.of(trial.campaign).append(trial.name, TrialState.FAILED, reason="made up")


def _until(condition: Any) -> None:
    while not condition():
        time.sleep(0.05)
