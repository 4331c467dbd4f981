# SPDX-License-Identifier: MIT
"""The life of one attempt: signals, heartbeat, contracts, and how each end is told from the others."""

import errno
import math
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ablab import machine, rundir
from ablab.build import DeviceError
from ablab.data import DataError
from ablab.kconf import Settled
from ablab.plugin import Clause, EffectError
from ablab.rundir import AttemptDir, DiskFullError, Rows, SupersededError

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
BEAT_S = 10.0
FULL = ("can't allocate memory", "error: out of memory", "BLAS_STATUS_ALLOC_FAILED")
"""In what torch raises as a plain error: a CPU, a driver, a library beside torch's own allocator of the device."""


class StoppedError(Exception):
    """A signal asked for the end; `saved` says whether there is a checkpoint to go on from."""

    def __init__(self, signum: int, saved: bool) -> None:
        where = "saved; make continue resumes" if saved else "before there was anything to save"
        super().__init__(f"{signal.Signals(signum).name}: {where}")
        self.signum, self.saved = signum, saved


class DivergedError(Exception):
    """A loss or gradient that is not finite; `facts` go into exit.json."""

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.facts = facts


class CapError(Exception):
    """TRAIN_CAP_TIME is used up."""


class Attempt:
    """What main and loop share: the places to write, the lease, the stop flag, the heartbeat."""

    def __init__(self, path: Path) -> None:
        self.dir = AttemptDir.open(path)
        self.trial = self.dir.trial
        self.lease = self.trial.lease() or {"lease": 0, "first": 1}
        self.guard = self.trial.guard(self.lease["lease"])
        self.settled: Settled | None = None
        self.ready = False
        """True once everything that a user decides has been accepted."""
        self.stop = 0
        """The signal that asked for the end; handlers set it and nothing else."""
        self.progress = 0
        self.contracts: dict[str, dict[str, Any]] = {}
        self.status = {"state": "running", "phase": "start", "attempt": self.dir.number}
        self.status |= {"lease": self.lease["lease"], "pid": os.getpid(), "host": machine.host()}
        self.status |= {"proc_start": machine.proc_start(os.getpid()), "boot_id": machine.boot_id()}
        self.status |= {"step": 0, "tokens": 0, "train_s": 0.0, "devices": []}
        self._beats, self._lock, self._end = 0, threading.Lock(), threading.Event()

    def phase(self, name: str) -> None:
        """Enter a phase, and say so before it begins.  Raises StoppedError if a signal asks for the end of start-up."""
        if self.stop and name != "end":
            raise StoppedError(self.stop, bool(self.trial.saved(self.lease["first"])))
        self.status["phase"] = name
        self.moved()
        self.beat()

    def moved(self) -> None:
        """Something was done: without this for STUDY_HANG seconds, the trial counts as hanging."""
        self.progress += 1

    def beat(self) -> None:
        """Write status.json."""
        with self._lock:
            self._beats += 1
            now = {**self.status, "beat": self._beats, "progress": self.progress}
            with suppress(SupersededError, OSError):  # the next save meets the same and knows what to do
                self.trial.write("status", now, guard=self.guard)

    def beats(self) -> None:
        """Beat until the end: the body of a thread."""
        while not self._end.wait(BEAT_S):
            self.beat()

    def end(self) -> None:
        """No beat after this."""
        self._end.set()

    def write(self, kind: str, payload: Mapping[str, Any]) -> None:
        """Write a file of the trial, as long as the lease is ours."""
        self.patiently(lambda: self.trial.write(kind, payload, guard=self.guard))

    def patiently(self, action: Callable[[], Any]) -> Any:
        """The value of `action`, repeated while the disk is full, unless told to stop."""

        def wait(seconds: float) -> None:
            self.moved()
            if self.stop:
                raise DiskFullError(f"{self.trial.path}: the disk is full, and {_name(self.stop)} asks for the end")
            time.sleep(seconds)

        return rundir.patiently(self.trial.campaign, action, wait=wait)

    def judge(self, clauses: Iterable[Clause], subject: Any, step: int) -> None:
        """Record whether contracts hold.  Raises EffectError, after all have been recorded."""
        header = {"trial": self.trial.name, "attempt": self.dir.number}
        rows = Rows(self.dir.contracts, "contracts", header)
        found = [{k: _json(v) for k, v in clause.judge(subject).items()} for clause in clauses]
        for result in found:
            rows.line({"step": step, **result})
            self.contracts.pop(result["name"], None)  # the order is that of the last time, resumed or not
            self.contracts[result["name"]] = result
        rows.close()
        broken = [f"{r['name']}: expected {r['expected']}, measured {r['measured']}" for r in found if not r["ok"]]
        if broken:
            raise EffectError(f"effect at step {step}: {'; '.join(broken)}")

    def run(self, work: Callable[["Attempt"], None]) -> int:
        """Do the work and write exit.json, whatever happens; returns the exit code."""
        before = {signum: signal.signal(signum, self._asked) for signum in STOPS}
        thread = threading.Thread(target=self.beats, daemon=True)
        try:
            self.trial.supersede(self.lease["lease"])
            self.phase("start")
            thread.start()
            work(self)
            ended = {"state": "done", "class": None, "code": 0, "message": "done"}
        except Exception as error:
            ended = self._judged(error)
        self.end()
        ended["step"] = ended.get("step", self.status["step"])
        print(f"{ended['state']}: {ended['message']}", ended.get("traceback") or "", sep="\n", flush=True)
        try:
            self.status["state"], self.status["phase"] = ended["state"], "end"
            self.beat()
            self.patiently(lambda: self.dir.write("exit", ended))
        except DiskFullError as error:
            print(error, flush=True)
        for signum, handler in before.items():
            signal.signal(signum, handler)
        return ended["code"]

    def _asked(self, signum: int, frame: Any) -> None:
        self.stop = self.stop or signum

    def _judged(self, error: Exception) -> dict[str, Any]:
        """State, class and exit code of an end (docs/faults.md)."""
        kinds: list[tuple[type | tuple[type, ...], str, str, int]] = [
            (DivergedError, "diverged", "diverged", 1),
            (EffectError, "failed", "effect", 1),
            (CapError, "failed", "cap", 1),
            (DiskFullError, "preempted", "disk", 75),
            (SupersededError, "interrupted", "lost", 75),
            (DataError, "refused", "data", 1),
            (DeviceError, "refused", "config", 1),
            ((torch.OutOfMemoryError, MemoryError), "oom", "oom", 1),
        ]
        if isinstance(error, StoppedError):
            state = "interrupted" if error.signum == signal.SIGINT or not error.saved else "preempted"
            code = 75 if error.saved or error.signum == signal.SIGUSR1 else 128 + error.signum
            return {"state": state, "class": "signal", "code": code, "message": str(error)}
        if isinstance(error, RuntimeError) and any(text in str(error) for text in FULL):
            error = MemoryError(str(error))
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            error = DiskFullError(f"{error}; free space, then make continue")
        for kind, state, name, code in kinds:
            if isinstance(error, kind):
                facts = error.facts if isinstance(error, DivergedError) else {}
                return {"state": state, "class": name, "code": code, "message": self._told(error), **facts}
        if isinstance(error, ValueError) and not self.ready:
            return {"state": "refused", "class": "config", "code": 2, "message": str(error)}
        trace = "".join(traceback.format_exception(error))
        message = f"{type(error).__name__}: {error}"
        return {"state": "failed", "class": "exception", "code": 1, "message": message, "traceback": trace}

    def _told(self, error: Exception) -> str:
        """The message; one about memory says what to change."""
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError | MemoryError) and self.settled:
            v, plan = self.settled.values, self.trial.record.get("forecast")
            smaller = [d for d in range(1, v["TRAIN_BATCH_MICRO"]) if v["TRAIN_BATCH_EFFECTIVE"] % d == 0]
            text = f"out of memory in phase {self.status['phase']}: {text.partition(chr(10))[0]}"
            text += f"; forecast {plan['mem_gib']} GiB" if plan else ""
            text += f"; make CONFIG_TRAIN_BATCH_MICRO={max(smaller, default=1)} needs less at equal effective batch"
        return text


def _json(value: Any) -> Any:
    """JSON has no nan and no infinity."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _name(signum: int) -> str:
    return signal.Signals(signum).name
