# SPDX-License-Identifier: MIT
# Size: one loop, with all that a running trial may meet beside it; Options belongs to it.
"""A runner's work on a campaign: takes queued trials under leases, starts their children, records their end.

The state of a trial lies in the journal alone, so several runners may work on one campaign.  A runner owns
the children that it started or adopted: it forwards stops to them and ends those that hang.
"""

import json
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any

from ablab import kconf, machine
from ablab.journal import RERUN, Journal, Replay, TrialState, Watch
from ablab.run import _display, _forecast, local, mirror
from ablab.run._sampling import Sampling
from ablab.rundir import Campaign, DiskFullError, RunError, TrialDir, patiently

TICK_S = 0.2
LOOK_S = 1.0  # between looks at heartbeats and at the trials of other runners
COMPILE_S = 1800  # a compilation reports no progress
KEPT = re.compile("^CONFIG_TRAIN_CKPT_(?:KEEP|TOP|BEST)=([0-9]+|y)$", re.MULTILINE)
IDLE = 0.95  # share of a device's memory that is free when nobody uses it
LOG_BYTES = 4 << 20  # of one trial: log, rows, telemetry
BAD = (TrialState.FAILED, TrialState.DIVERGED, TrialState.OOM, TrialState.REFUSED, TrialState.DEAD)
End = tuple[TrialState, str | None, str]
"""State, class, reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to run; nothing here changes a result."""

    results: Path | None = None
    """Folder of the campaigns; None is STUDY_RESULTS."""
    name: str | None = None
    """Name of the campaign; None makes one from study, day and plan."""
    jobs: int | None = None
    """Trials at once; None is what the plan says."""
    keep_going: bool | None = None
    check: bool = True
    """Dry run before anything is created."""
    yes: bool = False
    """Do not ask."""
    force: bool = False
    """Start although trials cannot fit; those are refused."""
    new: bool = False
    """Start another campaign even if there is one of the same plan."""
    tty: bool = False
    """Both streams are terminals: ask there, and draw bars."""
    verbose: bool = False
    last_s: float = 10.0
    """From the second ^C until children are killed."""
    wait_s: float = 5.0
    """Between looks for a free device."""
    yield_s: float = 30.0
    """From SIGTERM to SIGKILL for a trial that hangs."""
    report: Callable[[Campaign], None] | None = None
    """Called at the end, before the RESULT line."""
    target: str = "ablab.train:main"
    """What a child calls with its attempt folder."""
    checker: str = "ablab.check:main"
    """What checks a plan, called with a folder that holds plan.json; leaves verdict.json there."""
    preload: tuple[str, ...] = local.PRELOAD
    """What the server of the children imports."""
    trackers: tuple[str, ...] | None = None
    """What to mirror to; None is what the configuration says."""
    mirror: str = mirror.MODULE
    """Module of the mirror process."""


class Stop:
    """Stop signals set a flag here and nothing else; the handlers before it come back at its end."""

    def __init__(self) -> None:
        self.signals: list[int] = []

    def __enter__(self) -> "Stop":
        self._before = {s: signal.signal(s, lambda n, _: self.signals.append(n)) for s in local.STOPS}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)


@dataclass(slots=True)
class _Running:
    """A trial whose child is ours."""

    trial: TrialDir
    attempt: int
    lease: int
    child: local.Child
    slot: int
    device: local.DeviceLease | None = None
    oom_kills: int | None = None
    """Kills by the kernel before it started; None for an adopted child."""
    told: bool = False
    """It was told to stop."""
    doom: End | None = None
    """What it ends as, once it is ended by force."""
    kill_at: float | None = None
    progress: Any = None
    moved_at: float = field(default_factory=time.monotonic)
    """When its progress last changed."""


class Runner:
    """One process that works on a campaign until nothing is left to do, or it is told to stop."""

    def __init__(
        self,
        campaign: Campaign,
        options: Options,
        stop: Stop,
        server: local.Server,
        only: frozenset[str] | None = None,
    ) -> None:
        self.campaign, self.options, self.stop, self.server = campaign, options, stop, server
        self.policy = policy = campaign.content["policy"]
        self.names = [*campaign.records()]
        self.todo = [n for n in self.names if only is None or n in only]
        found = machine.inventory()
        gpu = any(r["resources"]["gpus"] for r in campaign.records().values())
        self.jobs = options.jobs or policy.get("jobs") or (len(found.devices) if gpu else 0) or 1
        self.cores, self.devices = local.core_sets(found.cores, self.jobs), found.devices
        self.keep_going = policy["keep_going"] if options.keep_going is None else options.keep_going
        self.journal = Journal.of(campaign)
        self.notes = len(self.journal.replay().notes)
        self.job = f"{os.getpid()}:{machine.proc_start(os.getpid())}"
        self.hearts = Watch(policy["grace_s"])
        self.screen = _display.Screen(campaign, self.names, options.tty, options.verbose)
        self.sampling = Sampling(campaign)
        self.mine: dict[str, _Running] = {}
        self.halt = 0
        """The signal to forward, once we stop."""
        self.failed = False
        self.forced = 0
        """Exit code of a trial that ended before a safe point."""
        self.waits_until = 0.0
        """When to look for a free device again."""
        self.checkpoint_bytes = policy.get("checkpoint_bytes", 0)
        """The largest checkpoint so far."""
        self.looked, self.published = 0.0, 0

    def run(self) -> None:
        """Work until nothing is left to do here."""
        self.campaign.stop_file.unlink(missing_ok=True)
        self.server.start()
        while True:
            self.heed()
            self.reap()
            due = time.monotonic() - self.looked >= LOOK_S
            if due:
                self.looked = time.monotonic()
                self.look()
                self.sampling.keep()
            self.launch()
            if self.idle():
                break
            if due and self.published < self.journal.replay().seq:
                self.publish(None)
            self.screen.tick([r.trial for r in self.mine.values()])
            sentinels = [r.child.process.sentinel for r in self.mine.values() if r.child.process]
            connection.wait(sentinels, TICK_S) if sentinels else time.sleep(TICK_S)
        self.sampling.stop()
        self.screen.clear()

    def conclude(self) -> int:
        """Record and print the result; returns the exit code."""
        states = [self.journal.replay().entry(n).state for n in self.names]
        left = any(not s.is_finished() for s in states) and (self.keep_going or not self.failed)
        if self.forced:
            code = self.forced
        elif left or any(s in _display.STOPPED for s in states):
            code = 75
        else:
            code = int(any(s in BAD for s in states))
        self.publish(code)
        if self.options.report:
            try:
                self.options.report(self.campaign)
            except ValueError as error:
                print(f"no report: {error}", file=sys.stderr)
        print(result_line(self.campaign, code), flush=True)
        return code

    def requeue(self) -> None:
        """Queue what a continue takes up again: what was stopped, what died, what no longer verifies."""
        self.failed = False  # what ended before this run does not count for KEEP_GOING=n
        for name, entry in list(self.journal.replay().items()):
            trial = self.campaign.trial(name)
            if entry.state is TrialState.DONE:
                if flaw := trial.flaw():
                    self.screen.say(f"{self.screen.head(trial)} runs again: {flaw}")
                    self.move(name, TrialState.QUEUED, RERUN, evidence=flaw)
            elif entry.may_retry(self.policy["retries"]):
                self.move(name, TrialState.QUEUED, "continue")
            elif entry.state is TrialState.DEAD:
                self.move(name, TrialState.FAILED, "retries used up", cls="lost")

    def heed(self) -> None:
        """Begin to stop when told to: by a signal, by `make stop`, by the end of the allocation."""
        asked = [n for n in self.journal.replay().notes[self.notes :] if n["kind"] == "stop"]
        end = os.environ.get("SLURM_JOB_END_TIME", "")
        if self.stop.signals:
            self.halt_by(self.stop.signals[0], signal.Signals(self.stop.signals[0]).name)
        elif asked:
            self.halt_by(signal.SIGTERM, asked[0]["reason"])
        elif end.isdecimal() and time.time() >= int(end) - self.policy["grace_s"]:
            self.halt_by(signal.SIGTERM, "the allocation ends")
        for run in self.mine.values():
            if self.halt and not run.told:
                run.told = True
                run.child.send(self.halt)
            if self.stop.signals.count(signal.SIGINT) > 1 and run.kill_at is None:
                why = f"killed {self.options.last_s:.0f} s after the second interrupt"
                run.doom = (TrialState.INTERRUPTED, "signal", why)
                run.kill_at = time.monotonic() + self.options.last_s

    def halt_by(self, signum: int, why: str) -> None:
        """Launch no more; `heed` tells the children."""
        if not self.halt:
            self.halt = signum
            self.screen.say(f"{why}: {len(self.mine)} running save and stop; make continue resumes")

    def reap(self) -> None:
        """Record the children that ended, kill those whose time is up."""
        for name, run in list(self.mine.items()):
            if run.child.gone():
                del self.mine[name]
                self.settle(run.trial, run.attempt, run.lease, run)
                if run.device:
                    run.device.release()
            elif run.kill_at is not None and time.monotonic() >= run.kill_at:
                run.child.send(signal.SIGKILL, group=True)

    def look(self) -> None:
        """Watch the heartbeats of our children, and take over trials whose runner is gone."""
        for run in self.mine.values():
            self.watch(run)
        entries = self.journal.replay()
        for name in [n for n, e in entries.items() if e.state is TrialState.RUNNING and n not in self.mine]:
            trial, entry = self.campaign.trial(name), entries.entry(name)
            lease = trial.lease()
            orphan = lease is None or not runner_alive(lease)
            if self.hearts.is_dead(trial) and (orphan or trial.attempt(entry.attempt).exit.exists()):
                self.settle(trial, entry.attempt, entry.lease)
            elif orphan and not self.halt and (child := child_of(trial, lease)):
                self.adopt(trial, entry.attempt, entry.lease, child)

    def adopt(self, trial: TrialDir, attempt: int, lease: int, child: local.Child) -> None:
        """Own a child whose runner is gone."""
        if self.safely(lambda: self.journal.assign(trial, lease, child.pid, job=self.job)):
            place = child.cores()
            slot = self.cores.index(place) if place in self.cores else -1
            self.mine[trial.name] = _Running(trial, attempt, lease, child, slot)
            self.screen.say(f"{self.screen.head(trial)} goes on; its runner is gone")

    def watch(self, run: _Running) -> None:
        """End a child that hangs: stacks, SIGTERM, 30 s, SIGKILL to its session."""
        now, status = time.monotonic(), run.trial.status()
        status = status if status and status["lease"] == run.lease else None
        if status and status["progress"] != run.progress:
            run.progress, run.moved_at = status["progress"], now
        phase = status["phase"] if status else "start"
        limit = max(self.policy["hang_s"], COMPILE_S if phase == "compile" else 0)
        if run.doom:
            return
        if now - run.moved_at >= limit:
            run.doom = (TrialState.DEAD, "hang", f"no progress for {limit} s in phase {phase}")
            run.kill_at = now + self.options.yield_s
            run.child.send(signal.SIGUSR2)
            run.child.send(signal.SIGTERM)
        elif self.hearts.is_dead(run.trial) and run.child.alive():
            run.doom = (
                TrialState.DEAD,
                "hang",
                f"no heartbeat for {self.policy['grace_s']} s in phase {phase}",
            )
            run.kill_at = now

    def queued(self, entries: Replay) -> str | None:
        """The next trial to start here; None if there is none or none may be started."""
        if self.halt or (self.failed and not self.keep_going):
            return None
        return next((n for n in self.todo if entries.entry(n).state is TrialState.QUEUED), None)

    def idle(self) -> bool:
        """True if nothing is left to do: none is ours, none may be started, and none runs elsewhere that may yet
        come back to the queue."""
        entries = self.journal.replay()  # one look: between two a trial could go from one to the other
        elsewhere = not self.halt and any(e.state is TrialState.RUNNING for e in entries.values())
        return not (self.mine or elsewhere or self.queued(entries))

    def launch(self) -> None:
        """Start queued trials while there is room."""
        if time.monotonic() < self.waits_until:
            return
        while len(self.mine) < self.jobs and (name := self.queued(self.journal.replay())):
            trial = self.campaign.trial(name)
            if refusal := self.refusal(trial):
                self.failed = True
                self.move(name, TrialState.REFUSED, refusal[1], cls=refusal[0])
                self.screen.say(f"{self.screen.head(trial)} refused ({refusal[0]}): {refusal[1]}")
                continue
            device = None
            if trial.record["resources"]["gpus"]:
                device, why = local.lease(self.devices, local.lock_folder(), self.memory(trial))
                if device is None:
                    self.waits_until = time.monotonic() + self.options.wait_s
                    return self.screen.once(f"waits for a device: {'; '.join(why)}")
            if not self.begin(trial, device) and device:
                device.release()

    def begin(self, trial: TrialDir, device: local.DeviceLease | None) -> bool:
        """Claim a trial and start its child; False if another runner was first."""
        lease = self.safely(lambda: self.journal.claim(trial, job=self.job))
        if not lease:
            return False
        attempt = trial.attempt(lease["attempt"])
        slot = min(set(range(self.jobs)) - {r.slot for r in self.mine.values()})
        kills = local.oom_kills()
        try:
            child = self.server.launch(
                self.options.target,
                str(attempt.path),
                log=attempt.log,
                stacks=attempt.stacks,
                cores=self.cores[slot],
                env=device.env if device else {},
            )
        except local.ChildError as error:
            self.move(trial.name, TrialState.INTERRUPTED, str(error), cls="lost")
            raise
        self.safely(lambda: self.journal.assign(trial, lease["lease"], child.pid))
        if device:
            device.name(child, f"{self.campaign.name} {trial.record['id']}")
        self.mine[trial.name] = _Running(trial, attempt.number, lease["lease"], child, slot, device, kills)
        where = f"attempt {attempt.number}, pid {child.pid}, cores {self.cores[slot]}, {attempt.log}"
        self.screen.detail(f"{self.screen.head(trial)} {where}")
        return True

    def refusal(self, trial: TrialDir) -> tuple[str, str] | None:
        """(class, reason) why a trial cannot run here now."""
        data = self.campaign.content["data"]
        if path := data.get("manifest"):
            try:
                found = json.loads((kconf.ROOT / path).read_text())["sha256"]
            except (OSError, ValueError, KeyError):
                return "data", f"{path}: gone or unreadable; make data"
            if found != data["sha256"]:
                return "data", f"{path}: hash {found[:8]}, the campaign began with {data['sha256'][:8]}"
        if trial.record["resources"]["gpus"] and not self.devices:
            return "config", "no GPU here; run it where there is one"
        rooms = [d.memory_bytes for d in self.devices] if trial.record["resources"]["gpus"] else [machine.memory()]
        if (told := trial.record.get("forecast")) and (why := _forecast.beyond(told, rooms)):
            return "memory", f"{why}; a smaller TRAIN_BATCH_MICRO needs less at equal effective batch"
        free, need = shutil.disk_usage(self.campaign.path).free, self.disk_bytes(trial)
        if free < need:
            return "disk", f"{need >> 20} MiB needed, {free >> 20} free in {self.campaign.path}; make room"
        return None

    def memory(self, trial: TrialDir) -> int:
        """Bytes of device memory that must be free: the high forecast, but no more than an idle device has."""
        high, most = trial.record["resources"]["mem_gib"] * 2**30, max(d.memory_bytes for d in self.devices)
        return int(min(high, IDLE * most))

    def disk_bytes(self, trial: TrialDir) -> int:
        """What a trial may write: the checkpoints that it keeps and one more, each as the largest, and logs."""
        kept = sum(1 if n == "y" else int(n) for n in KEPT.findall(trial.config.read_text()))
        return LOG_BYTES + (kept + 1) * self.checkpoint_bytes

    def settle(self, trial: TrialDir, number: int, lease: int, run: _Running | None = None) -> None:
        """Move a trial whose process is gone to the state that its files and its exit code tell."""
        attempt = trial.attempt(number)
        try:
            said, done = attempt.read("exit"), trial.read("done")
        except RunError as error:
            said, done = {"state": "failed", "class": "data", "message": str(error), "code": 1}, None
        state, cls, reason = _judge(said, run)
        if state is TrialState.DONE or (done and done["lease"] == lease):
            flaw = trial.flaw()
            state, cls, reason = (TrialState.FAILED, "lost", flaw) if flaw else (TrialState.DONE, None, "done")
        file = attempt.exit if said else attempt.log
        facts = {
            "attempt": number,
            "lease": lease,
            "cls": cls,
            "evidence": str(file.relative_to(self.campaign.path)),
        }
        if not self.move(trial.name, state, reason, **facts):
            return
        if state is TrialState.DONE:
            self.safely(lambda: _forecast.score(trial, number))
        for saved in trial.saved()[:1]:
            self.checkpoint_bytes = max(self.checkpoint_bytes, sum(p.stat().st_size for p in saved.path.iterdir()))
        again = self.journal.replay().entry(trial.name).may_retry(self.policy["retries"])
        again = again and state is TrialState.DEAD
        self.screen.ended(trial, file, state, cls, f"{reason}; tries again" if again else reason, again)
        if state in _display.STOPPED:
            code = said["code"] if said else 130 if run and run.doom else 0
            self.forced = self.forced or (code if code in (130, 143) else 0)
        elif again:
            self.move(trial.name, TrialState.QUEUED, "retry")
        elif state in BAD:
            self.failed = True
            if state is TrialState.DEAD:
                self.move(trial.name, TrialState.FAILED, f"{reason}; retries used up", **facts)

    def move(self, name: str, to: TrialState, reason: str, **facts: Any) -> bool:
        """Write a change of state; False if another runner was first."""
        return bool(self.safely(lambda: self.journal.append(name, to, reason=reason, **facts)))

    def publish(self, code: int | None) -> None:
        """Write the campaign's status.json."""
        entries = self.journal.replay()
        self.published = entries.seq
        content = {
            "counts": counts(entries, self.names),
            "running": [n for n in self.names if entries.entry(n).state is TrialState.RUNNING],
            "eta_s": _display.estimate(self.campaign, entries)["left_s"],
            "exit": code,
            "result": None if code is None else result_line(self.campaign, code),
        }
        self.safely(lambda: self.campaign.write_status(content))

    def safely(self, action: Callable[[], Any]) -> Any:
        """The value of `action`; a full disk is waited for, then ends the run as a stop does."""
        try:
            return patiently(self.campaign, action, wait=self.wait_for_space)
        except DiskFullError as error:
            self.halt_by(signal.SIGTERM, str(error))
            return None

    def wait_for_space(self, seconds: float) -> None:
        if self.stop.signals:
            raise DiskFullError(f"{self.campaign.path}: disk full, and told to stop")
        time.sleep(seconds)


def _judge(said: Mapping[str, Any] | None, run: _Running | None) -> End:
    """How an attempt ended, from its exit.json, or else from how its process did."""
    if run and run.doom and (run.doom[0] is TrialState.DEAD or not said):
        return run.doom
    if said:
        return TrialState(said["state"]), said.get("class"), said["message"]
    code = run.child.code() if run else None
    if code == -signal.SIGKILL and run.oom_kills is not None and local.oom_kills() > run.oom_kills:
        return TrialState.OOM, "oom", "killed by the kernel: out of memory"
    if code == 75 or (run and run.told):
        return TrialState.INTERRUPTED, "signal", "stopped before it could save anything"
    if code is not None and code < 0:
        return TrialState.DEAD, "signal", f"killed by {signal.Signals(-code).name}"
    return TrialState.DEAD, "lost", "gone without exit.json" + ("" if code is None else f", exit code {code}")


def counts(entries: Replay, names: list[str]) -> dict[str, int]:
    """State -> number of trials; zeros are left out, but `done` is always there."""
    found = Counter(entries.entry(n).state for n in names)
    order = (TrialState.DONE, *(s for s in TrialState if s is not TrialState.DONE))
    return {s.value: found[s] for s in order if found[s] or s is TrialState.DONE}


def result_line(campaign: Campaign, code: int | None = None) -> str:
    """`RESULT: exit=1 done=9 failed=1 results/NAME`, the last line of a run.

    Without `code` it shows the recorded one.
    """
    if code is None:
        code = (campaign.status() or {}).get("exit")
    found = counts(Journal.of(campaign).replay(), [*campaign.records()])
    return " ".join([f"RESULT: exit={code}", *(f"{k}={v}" for k, v in found.items()), _display.shown(campaign.path)])


def runner_alive(lease: Mapping[str, Any]) -> bool:
    """True if the runner that owns a local child lives on this host."""
    pid, _, start = (lease.get("job") or "").partition(":")
    here = (lease["host"], lease["boot_id"]) == (machine.host(), machine.boot_id())
    return here and pid.isdecimal() and str(machine.proc_start(int(pid))) == start


def child_of(trial: TrialDir, lease: Mapping[str, Any]) -> local.Child | None:
    """The living child of a lease, if it is on this host."""
    status = trial.status()
    holder = status if status and status["lease"] == lease["lease"] else lease
    if (holder["host"], holder["boot_id"]) != (machine.host(), machine.boot_id()):
        return None
    child = local.Child(holder["pid"], holder["proc_start"])
    return child if child.alive() else None
