# SPDX-License-Identifier: MIT
"""The state of every trial: an append-only journal, leases with fencing numbers, and who is dead.

A line of journal.jsonl is one change of one trial, or of kind `amend`, `note`, `stop`; a state is what the
lines add up to and nothing else.  The key of a trial is the name of its folder; without a line it is queued.
"""

import fcntl
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from ablab import machine, rundir

RERUN = "rerun"
"""The reason of a line that queues a trial to start over at step 0."""
_threads = threading.Lock()  # POSIX locks keep processes apart, not threads


class TrialState(StrEnum):
    """The ten states of a trial."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    DIVERGED = "diverged"
    OOM = "oom"
    REFUSED = "refused"
    PREEMPTED = "preempted"
    INTERRUPTED = "interrupted"
    DEAD = "dead"

    def is_finished(self) -> bool:
        """True if nobody works on it and nobody is about to."""
        return self not in (TrialState.QUEUED, TrialState.RUNNING)

    def is_resumable(self) -> bool:
        """True if it was stopped by something outside of it."""
        return self in (TrialState.PREEMPTED, TrialState.INTERRUPTED, TrialState.DEAD)

    def follows(self, before: "TrialState", reason: str) -> bool:
        """True if a trial may go from `before` to this state."""
        if self is TrialState.QUEUED:
            return before.is_finished() and (before is not TrialState.DONE or reason == RERUN)
        if before is TrialState.QUEUED:
            return self in (TrialState.RUNNING, TrialState.REFUSED)
        if before is TrialState.RUNNING:
            return self is not TrialState.RUNNING
        return (before, self) == (TrialState.DEAD, TrialState.FAILED)


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a trial stands."""

    state: TrialState = TrialState.QUEUED
    attempt: int = 0
    """Newest attempt, 0 before the first."""
    lease: int = 0
    """Fencing number of the newest attempt."""
    first: int = 1
    """Oldest attempt whose checkpoints may be resumed: a rerun moves it."""
    ends: Mapping[str, int] = field(default_factory=dict)
    """How often it ended in each state since the last rerun."""
    reason: str = ""
    cls: str | None = None
    evidence: str | None = None
    wall: float = 0.0
    """Clock time of the last change, for display only."""

    def may_retry(self, budgets: Mapping[str, int]) -> bool:
        """True if `budgets`, state -> further attempts, let it be queued again."""
        return self.state.is_finished() and self.ends.get(self.state, 0) <= budgets.get(self.state, 0)


class Replay(dict[str, Entry]):
    """Trial -> Entry for the trials that have a line; `entry` serves all."""

    def __init__(self) -> None:
        super().__init__()
        self.seq = 0
        self.lease = 0
        """The highest fencing number."""
        self.notes: list[dict[str, Any]] = []
        """Lines of kind amend, note and stop."""
        self.problems: list[str] = []
        """Lines that do not count: damaged, of an old lease, or out of order."""

    def entry(self, trial: str) -> Entry:
        """Where a trial stands."""
        return self.get(trial) or Entry()


class Journal:
    """Reader and writer of the journal of a campaign; any number of processes may have one."""

    def __init__(self, path: Path, lock: Path, write: rundir.Write = os.write) -> None:
        self._path = path
        self._lock = lock
        self._write = write
        self._reset()

    @classmethod
    def of(cls, campaign: rundir.Campaign) -> "Journal":
        """The journal of a campaign."""
        return cls(campaign.journal, campaign.lock)

    def replay(self) -> Replay:
        """The state of all trials.  Reads only what is new; the value is shared, do not change it."""
        try:
            with rundir.plain(self._path) as file:
                if file.seek(0, os.SEEK_END) < self._offset:
                    self._reset()
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return self._state
        whole = data[: data.rfind(b"\n") + 1]  # what follows is torn, or being written
        self._offset += len(whole)
        for line in whole.split(b"\n")[:-1]:
            self._line += 1
            self._fold(line)
        return self._state

    def append(
        self,
        trial: str,
        to: TrialState,
        *,
        reason: str,
        attempt: int | None = None,
        lease: int | None = None,
        cls: str | None = None,
        evidence: str | None = None,
    ) -> bool:
        """Move a trial to a state; attempt and lease are by default those of its entry.

        False, with nothing written, if somebody else was first: the lease is not the newest, or the state
        does not follow the present one.  Look at replay() again then.  Use claim() for running.
        """
        with self.exclusive() as state:
            entry = state.entry(trial)
            if lease not in (None, entry.lease) or not to.follows(entry.state, reason):
                return False
            number = entry.attempt if attempt is None else attempt
            self._append(trial, entry.state, to, number, entry.lease, reason=reason, cls=cls, evidence=evidence)
            return True

    def claim(
        self,
        trial: rundir.TrialDir,
        *,
        reason: str = "start",
        executor: str = "local",
        job: str | None = None,
    ) -> dict[str, Any] | None:
        """Take a queued trial: next fencing number, next attempt's folder, lease.json, queued -> running.

        Returns the content of lease.json, or None when the trial is not queued any more.
        """
        with self.exclusive() as state:
            entry = state.entry(trial.name)
            if entry.state is not TrialState.QUEUED:
                return None
            attempt = max([entry.attempt, *(a.number for a in trial.attempts())]) + 1
            before = trial.lease()
            number = max(state.lease, before["lease"] if before else 0) + 1
            first = entry.first if entry.attempt >= entry.first else attempt
            lease = {"lease": number, "attempt": attempt, "first": first, "fresh": first == attempt}
            lease |= {**owner(os.getpid()), "executor": executor, "job": job}
            trial.new_attempt(attempt)
            trial.write("lease", lease, write=self._write)
            self._append(trial.name, entry.state, TrialState.RUNNING, attempt, number, reason=reason)
            return lease

    def assign(self, trial: rundir.TrialDir, lease: int, pid: int, job: str | None = None) -> bool:
        """Put the child in the place of the runner in lease.json; False if the lease is not the newest."""
        with self.exclusive():
            newest = trial.lease()
            if newest is None or newest["lease"] != lease:
                return False
            holder = {**owner(pid), "job": job or newest.get("job")}
            trial.write("lease", {**newest, **holder}, write=self._write)
            return True

    def note(self, kind: str, reason: str, **facts: Any) -> None:
        """Append a line of kind `amend`, `note` or `stop`."""
        with self.exclusive():
            self._line_out({"kind": kind, "reason": reason, **facts})

    @contextmanager
    def exclusive(self) -> Iterator[Replay]:
        """Hold the lock of the campaign; the value is the newest state.  It cannot be nested."""
        # POSIX locks work over NFS, and the kernel drops them with their process
        with _threads, open(self._lock, "ab", opener=rundir.no_link) as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)
            yield self.replay()

    def _append(
        self,
        trial: str,
        before: str,
        to: str,
        attempt: int,
        lease: int,
        *,
        cls: str | None = None,
        **why: Any,
    ) -> None:
        change = {
            "trial": trial,
            "attempt": attempt,
            "lease": lease,
            "from": before,
            "to": to,
            **why,
            "class": cls,
        }
        self._line_out({k: v for k, v in change.items() if v is not None})

    def _line_out(self, change: dict[str, Any]) -> None:
        rows = rundir.Rows(self._path, "journal", {}, write=self._write)
        try:
            stamp = {"seq": self._state.seq + 1, "wall": time.time()}
            rows.line({**stamp, **change, "host": machine.host(), "pid": os.getpid()})
        finally:
            rows.close()
        self.replay()

    def _reset(self) -> None:
        self._offset = self._line = 0
        self._state = Replay()

    def _fold(self, line: bytes) -> None:
        state = self._state
        try:
            row = json.loads(line)
            if "schema" in row:
                return
            state.seq = row["seq"]
            if "kind" in row:
                state.notes.append(row)
                return
            entry, lease, reason = state.entry(row["trial"]), row["lease"], row["reason"]
            to = TrialState(row["to"])
            current = lease == entry.lease or (to is TrialState.RUNNING and lease > state.lease)
            if not current or not to.follows(entry.state, reason):
                change = f"{row['trial']} {entry.state} -> {to}, lease {lease}"
                state.problems.append(f"{self._path}:{self._line}: {change}: too late, not counted")
                return
            state.lease = max(state.lease, lease)
            fresh = to is TrialState.QUEUED and reason == RERUN
            state[row["trial"]] = replace(
                entry,
                state=to,
                attempt=row["attempt"],
                lease=lease,
                first=row["attempt"] + 1 if fresh else entry.first,
                ends={} if fresh else Counter(entry.ends) + Counter([to] * to.is_finished()),
                reason=reason,
                cls=row.get("class"),
                evidence=row.get("evidence"),
                wall=row["wall"],
            )
        except (ValueError, KeyError, TypeError):
            state.problems.append(f"{self._path}:{self._line}: damaged, not counted")


def owner(pid: int) -> dict[str, Any]:
    """What tells a process from all others, as in lease.json and status.json."""
    start = machine.proc_start(pid)
    return {"host": machine.host(), "pid": pid, "proc_start": start or 0, "boot_id": machine.boot_id()}


class Watch:
    """Tells which running trials have lost their process; a runner keeps one as long as it lives."""

    def __init__(self, grace_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._grace_s = grace_s
        self._clock = clock
        self._beats: dict[str, tuple[Any, float]] = {}

    def is_dead(self, trial: rundir.TrialDir) -> bool:
        """True if the owner of the newest lease is gone; exit.json tells whether it ended by itself.

        On this host and boot: there is no process of its pid and start.  Else, and if it is merely stopped:
        its beat has not changed for the grace time, by our own monotonic clock.
        """
        lease, status = trial.lease(), trial.status()
        if lease is None:
            return True
        holder = status if status and status["lease"] == lease["lease"] else lease
        here = (holder["host"], holder["boot_id"]) == (machine.host(), machine.boot_id())
        if here and machine.proc_start(holder["pid"]) != holder["proc_start"]:
            return True
        beat, now = (lease["lease"], holder.get("beat")), self._clock()
        if self._beats.get(trial.name, (None,))[0] != beat:
            self._beats[trial.name] = beat, now
        return now - self._beats[trial.name][1] >= self._grace_s
