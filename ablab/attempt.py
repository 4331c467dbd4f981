# SPDX-License-Identifier: MIT
"""The life of one attempt: signals, heartbeat, what is recorded of it, and how each end is told from the others."""

import errno
import hashlib
import json
import math
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ablab import machine, provenance, rundir
from ablab.build import Built, DeviceError
from ablab.config import Amp, RunConfig
from ablab.data import DataError
from ablab.kconf import DECORATION, Settled
from ablab.plugin import Clause
from ablab.rundir import AttemptDir, DiskFullError, Rows, SupersededError

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
BEAT_S = 10.0
KERNELS = ("math", "flash", "efficient", "cudnn")  # in the order of torch.nn.attention.SDPBackend
DRIFT = (
    "config",
    "code.tree",
    "data.sha256",
    "software.torch",
    "devices",
    "cpu.model",
    "resolved.threads",
    "batch",
)
"""Parts of a manifest that a resumed attempt must find unchanged."""


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


class EffectError(Exception):
    """A contract does not hold."""


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
        self.status = {
            "state": "running",
            "phase": "start",
            "attempt": self.dir.number,
            "lease": self.lease["lease"],
        }
        self.status |= {
            "pid": os.getpid(),
            "proc_start": machine.proc_start(os.getpid()),
            "host": machine.host(),
        }
        self.status |= {"boot_id": machine.boot_id(), "step": 0, "tokens": 0, "train_s": 0.0, "devices": []}
        self._beats, self._lock, self._end = 0, threading.Lock(), threading.Event()

    def phase(self, name: str) -> None:
        """Enter a phase, and say so before it begins."""
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
            try:
                self.trial.write("status", now, guard=self.guard)
            except (SupersededError, OSError):
                pass  # the next save meets the same and knows what to do; a missed beat harms nobody

    def beats(self) -> None:
        """Beat until the end: the body of a thread."""
        while not self._end.wait(BEAT_S):
            self.beat()

    def end(self) -> None:
        """No beat after this."""
        self._end.set()

    def record(self, kind: str, payload: Mapping[str, Any]) -> None:
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
        if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):
            error = MemoryError(str(error))  # what torch raises on a CPU
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
            v = self.settled.values
            micro = max(
                (d for d in range(1, v["TRAIN_BATCH_MICRO"]) if v["TRAIN_BATCH_EFFECTIVE"] % d == 0),
                default=1,
            )
            text = f"out of memory in phase {self.status['phase']}: {text.splitlines()[0] if text else ''}"
            text += f"; make CONFIG_TRAIN_BATCH_MICRO={micro} keeps the effective batch and needs less"
        return text


def _json(value: Any) -> Any:
    """JSON has no nan and no infinity."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _name(signum: int) -> str:
    return signal.Signals(signum).name


def manifest(
    settled: Settled,
    origins: Mapping[str, str],
    cfg: RunConfig,
    built: Built,
    device: torch.device,
    data: Mapping[str, Any],
) -> dict[str, Any]:
    """What runs, less what the attempt adds; settings as torch reports them, not as they were asked for.

    `origins` says which line of which file set a symbol; `data` is the manifest of the prepared set.
    """
    t, here, gpu = cfg.train, machine.inventory(), device.type == "cuda"
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}
    backends = torch.backends
    return {
        "config": {
            symbol: {
                "value": value,
                "text": settled.text[symbol],
                "origin": origins.get(symbol, "default"),
            }
            for symbol, value in settled.values.items()
        },
        "resolved": {
            "compile": cfg.sys.compile.value,
            "amp": cfg.sys.amp.value,
            "tf32": backends.cuda.matmul.allow_tf32 if gpu else None,
            "cudnn_benchmark": backends.cudnn.benchmark if gpu else None,
            "attention_kernel": _attention_kernel(cfg, built, device),
            "threads": torch.get_num_threads(),
            "workers": 0,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        },
        "batch": {
            "micro": t.batch_micro,
            "accum": t.batch_effective // t.batch_micro,
            "world": 1,
            "effective": t.batch_effective,
            "seq_len": built.length,
            "tokens_per_step": t.batch_effective * built.length,
        },
        "budget": {"kind": t.budget.value, "limit": getattr(t, t.budget.value)},
        "seeds": {"train": t.seed, "data": t.seed, "eval": 0},
        "data": {
            "name": data["name"],
            "sha256": data["sha256"],
            "tokenizer": data["tokenizer"]["sha256"],
            "split": hashlib.sha256(json.dumps(data["splits"], sort_keys=True).encode()).hexdigest(),
            "order_seed": t.seed,
        },
        "code": provenance.code(),
        "software": provenance.software() | versions,
        "devices": [_device(d) for d in here.devices] if gpu else [],
        "cpu": {"model": here.cpu, "cores": list(here.cores)},
        "env": provenance.environment(),
        "neighbours": [],
    }


def _device(d: machine.Device) -> dict[str, Any]:
    return {"kind": d.kind, "name": d.name, "uuid": d.uuid, "memory_bytes": d.memory_bytes}


def _attention_kernel(cfg: RunConfig, built: Built, device: torch.device) -> str:
    """What torch picks for causal attention of this head size, dtype and device."""
    c, dtype = cfg.model.config, torch.bfloat16 if cfg.sys.amp is Amp.BF16 else torch.float32
    q = torch.empty(1, c.heads, built.length, c.embed // c.heads, dtype=dtype, device=device)
    return KERNELS[torch._fused_sdp_choice(q, q, q, is_causal=True)]


def drift(
    before: Mapping[str, Any], now: Mapping[str, Any], allowed: Iterable[str] = ()
) -> tuple[list[str], list[str]]:
    """(keys that differ and may, a line for each that may not) between the manifests of two attempts."""
    found: dict[str, str] = {}
    for key in DRIFT:
        sides = []
        for side in (before, now):
            for part in key.split("."):
                side = side[part]
            sides.append(_facts(key, side))
        a, b = sides
        for name in sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k)):
            found[name] = f"{a.get(name, 'absent')} before, {b.get(name, 'absent')} now"
    fine = [name for name in found if {name, name.partition(".")[0]} & set(allowed)]
    return fine, [f"{name}: {text}" for name, text in found.items() if name not in fine]


def _facts(key: str, value: Any) -> dict[str, Any]:
    if key == "config":
        chosen = {s: e["text"] for s, e in value.items() if s.partition("_")[0] not in DECORATION}
        return {f"config.{symbol}": text for symbol, text in chosen.items()}
    if isinstance(value, Mapping):
        return {f"{key}.{name}": v for name, v in value.items()}
    return {key: [d["name"] for d in value] if key == "devices" else value}
