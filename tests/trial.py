# SPDX-License-Identifier: MIT
"""A campaign of one tiny trial, and the child process that trains it: what tests of the training side start from."""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from ablab import kconf, machine, plan, provenance, rundir, train
from ablab.attempt import Attempt
from ablab.journal import Journal, TrialState
from ablab.rundir import AttemptDir, Campaign, TrialDir

TINY = """
CONFIG_DATA_SYNTH=y
CONFIG_DATA_SYNTH_TOKENS=20000
CONFIG_DATA_DIR="{data}"
CONFIG_MODEL_GPT_LAYERS=2
CONFIG_MODEL_GPT_HEADS=2
CONFIG_MODEL_GPT_EMBED=32
CONFIG_MODEL_GPT_BLOCK=32
CONFIG_MODEL_GPT_VOCAB=256
CONFIG_MLP_GELU_WIDTH=64
CONFIG_SCHED_WARMUP=4
CONFIG_TRAIN_STEPS=20
CONFIG_TRAIN_BATCH_EFFECTIVE=4
CONFIG_TRAIN_BATCH_MICRO=2
CONFIG_TRAIN_LOG_STEPS=3
CONFIG_TRAIN_CKPT_INTERVAL=5
CONFIG_EVAL_INTERVAL=4
CONFIG_EVAL_TOKENS=512
CONFIG_SYS_DEVICE_CPU=y
CONFIG_SYS_COMPILE_OFF=y
CONFIG_SYS_AMP_OFF=y
CONFIG_SYS_THREADS=1
"""
HERE = machine.Machine(cores=(0,), memory_bytes=1 << 34, cpu="test", devices=(), host="test", boot_id="test")
TIMES = re.compile(r"time/|memory/host|train/(tok|samples|step|mfu)|total_training_time")
NO_DATA = {"name": "synth", "sha256": "0" * 64, "tokens": None}


def settled(data: Path, extra: str = "") -> kconf.Settled:
    """The tiny configuration, and on top of it `extra`."""
    texts = (TINY.format(data=data), extra)
    return kconf.settle(kconf.load(), [kconf.lex(Path("test"), t, f"layer {i}") for i, t in enumerate(texts)])


def campaign(tmp_path: Path, extra: str = "", name: str = "test") -> TrialDir:
    """A trial that is queued in a new campaign; data is shared below `tmp_path`."""
    base = kconf.lex(Path("test"), settled(tmp_path / "data", extra).minimal(), "test")
    todo = plan.expand([base], {}, HERE, name="test")
    (trial,) = todo.trials
    content = plan.frozen(
        todo,
        name=name,
        created="now",
        code=provenance.code(),
        data=NO_DATA,
        check={"verdict": "skipped", "sha256": None},
    )
    made = Campaign.create(tmp_path / "results", name, content, {trial.folder: trial.config})
    return made.trial(trial.folder)


def claim(trial: TrialDir) -> AttemptDir:
    """The folder of the next attempt, under a new lease."""
    lease = Journal.of(trial.campaign).claim(trial)
    assert lease, "the trial is not queued"
    return trial.attempt(lease["attempt"])


def forked(attempt: AttemptDir, before: Callable[[], None] = lambda: None) -> int:
    """Train in a forked process, where `before` may change what it likes; returns its wait status."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        log = os.open(attempt.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout = open(1, "w", closefd=False)  # pytest's own would keep it  # noqa: SIM115
        code = 99
        try:
            before()
            code = train.main(str(attempt.path))
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def signalled(at: int, signum: int) -> Callable[[], None]:
    """A `before` that signals the process itself at its event number `at`: a step, batch, fsync or rename."""
    left = [at]

    def counted(call: Callable) -> Callable:
        def count(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signum)
            return call(*args, **kwargs)

        return count

    def before() -> None:
        for owner, name in ((Attempt, "moved"), (os, "fsync"), (os, "rename"), (os, "replace")):
            setattr(owner, name, counted(vars(owner)[name]))

    return before


def ended(trial: TrialDir, attempt: AttemptDir) -> str:
    """Write the end of an attempt into the journal, as a runner does, and queue what may go on; the state."""
    said = attempt.read("exit")
    state = TrialState(said["state"]) if said else TrialState.DEAD
    journal = Journal.of(trial.campaign)
    assert journal.append(trial.name, state, reason="test")
    if state.is_resumable():
        assert journal.append(trial.name, TrialState.QUEUED, reason="continue")
    return str(state)


def outcome(trial: TrialDir) -> dict:
    """What an interruption must not change: weights, state, rows and summary, all without times."""
    last = trial.saved()[0]
    files = last.read("checkpoint")["files"]
    rows = [
        (r["step"], r["tokens"], r["flops"], {k: v for k, v in r["m"].items() if not TIMES.match(k)})
        for r in rundir.rows(trial)
    ]
    summary = trial.summary()
    kept = {k: summary[k] for k in ("stop", "primary", "final", "best", "model", "contracts")}
    hashes = {n: files[n]["sha256"] for n in files if n.endswith("safetensors")}
    return {"step": last.step, "hashes": hashes, "rows": rows, "summary": kept, "flaw": trial.flaw()}
