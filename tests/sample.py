# SPDX-License-Identifier: MIT
"""A campaign as the runner and its children would leave it, for tests that need one on disk."""

import hashlib
from pathlib import Path

from ablab import journal, rundir

START = {"tokens": 0, "train_s": 0.0, "wall_s": 0.0, "flops": 0.0}


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


def record(n, **changes):
    """A trial of the plan: r<n>-s1337."""
    return {
        "id": f"r{n}-s1337",
        "hash": digest(f"trial {n}"),
        "group": digest(f"group {n}"),
        "step": f"R{n}",
        "title": f"Step {n}",
        "axes": {},
        "seed": 1337,
        "overrides": ["CONFIG_ATTN_RECIPROCAL=y"] if n else [],
        "superseded": [],
        "resources": {"gpus": 0, "cpus": 1, "mem_gib": 0.5},
        "forecast": None,
        **changes,
    }


def plan(n=2, **changes):
    """Content of campaign.json with n trials."""
    return {
        "name": "demo",
        "created": "2026-01-01T00:00:00Z",
        "kind": "ablation",
        "plan": digest("plan"),
        "study": {"name": "demo", "text": "base tiny\n", "sha256": digest("base tiny\n")},
        "base": {
            "layers": [{"origin": "defconfigs/tiny", "sha256": digest("tiny")}],
            "config": "CONFIG_X=y\n",
        },
        "make_vars": {"SEEDS": "1"},
        "trials": [record(i) for i in range(n)],
        "skipped": [{"axes": {"OPT": "SGD"}, "reason": "PRUNE_STATE needs OPT_CARRIES_PRUNER"}],
        "contrasts": [["R1", "R0"]],
        "registration": {"metric": "val_loss"},
        "auto": {},
        "policy": {
            "keep_going": True,
            "retries": {"preempted": 100, "dead": 1},
            "grace_s": 120,
            "hang_s": 600,
        },
        "code": {"commit": None, "dirty": True, "patch": None, "tree": digest("tree")},
        "data": {"name": "synth", "sha256": digest("data"), "tokens": 1000},
        "check": {"verdict": "passed", "sha256": None},
        "executor": "local",
        **changes,
    }


def campaign(results, n=2, name="demo", **changes):
    """A campaign with n queued trials."""
    content = plan(n, **changes)
    configs = {rundir.folder_of(t): f"# {t['id']}\n" for t in content["trials"]}
    return rundir.Campaign.create(Path(results), name, content, configs)


def manifest(trial, lease):
    return {
        "campaign": trial.campaign.name,
        "trial": {k: trial.record[k] for k in ("id", "hash", "group")},
        "attempt": lease["attempt"],
        "lease": lease["lease"],
        "created": "2026-01-01T00:00:00Z",
        "config": {"OPT_LR": {"value": 1e-3, "text": '"1e-3"', "origin": "default"}},
        "resolved": {
            "compile": "off",
            "amp": "off",
            "tf32": False,
            "cudnn_benchmark": False,
            "attention_kernel": "sdpa",
            "threads": 1,
            "workers": 0,
        },
        "batch": {"micro": 4, "accum": 1, "world": 1, "effective": 4, "seq_len": 32, "tokens_per_step": 128},
        "budget": {"kind": "steps", "limit": 10},
        "seeds": {"train": 1337, "data": 1, "eval": 2},
        "data": {
            "name": "synth",
            "sha256": digest("data"),
            "tokenizer": None,
            "split": digest("s"),
            "order_seed": 1,
        },
        "code": trial.campaign.content["code"],
        "software": {
            "python": "3.11.7",
            "torch": "2.13.0",
            "cuda": None,
            "hip": None,
            "driver": None,
            "kernel": "6",
        },
        "devices": [],
        "cpu": {"model": "some cpu", "cores": [0]},
        "env": {},
        "neighbours": [],
        "resume": None,
    }


def summary(trial, lease, loss=3.0):
    clocks = ("train", "startup", "compile", "warmup", "eval", "checkpoint", "data", "other", "total")
    return {
        "trial": trial.name,
        "attempt": lease["attempt"],
        "attempts": lease["attempt"],
        "stop": "budget",
        "primary": {"key": "val_loss", "value": loss, "direction": "lower", "step": 10},
        "final": {"val_loss": loss},
        "best": {"val_loss": {"value": loss, "step": 10}},
        "used": {"steps": 10, "tokens": 1280, **{f"{clock}_s": 1.0 for clock in clocks}},
        "perf": {
            "tok_per_s": 1e4,
            "step_ms_p50": 10.0,
            "step_ms_p95": 12.0,
            "mfu": None,
            "peak_mem_bytes": 1 << 20,
        },
        "model": {"params": 100, "trainable": 100, "fingerprint": digest("model")},
        "contracts": [{"name": "params", "ok": True, "expected": 100, "measured": 100}],
        "forecast": None,
    }


def status(trial, lease, beat=1, **changes):
    return {
        "state": "running",
        "phase": "train",
        "attempt": lease["attempt"],
        "lease": lease["lease"],
        **{k: lease[k] for k in ("pid", "proc_start", "boot_id", "host")},
        "beat": beat,
        "progress": beat,
        "step": 0,
        "tokens": 0,
        "train_s": 0.0,
        "eta_s": None,
        "loss": None,
        "devices": [],
        **changes,
    }


def metric_rows(trial, lease, resumed=0, steps=range(1, 11), name="train_loss", value=None):
    """Rows of an attempt: `name` = value, by default attempt * 1000 + step, at each of the steps."""
    header = {"trial": trial.name, "attempt": lease["attempt"], "resumed_at_step": resumed}
    rows = rundir.Rows(trial.attempt(lease["attempt"]).metrics, "metrics", header)
    for step in steps:
        rows.row(step, {name: lease["attempt"] * 1000.0 + step if value is None else value}, **START)
    rows.close()


def finish(trial, loss=3.0, resumed=0):
    """Claim a queued trial and do what a child does that ends well, up to the journal.  Returns the lease."""
    log = journal.Journal.of(trial.campaign)
    lease = log.claim(trial)
    attempt = trial.attempt(lease["attempt"])
    trial.supersede(lease["lease"])
    for folder in (attempt, trial):
        folder.write("manifest", manifest(trial, lease))
    trial.write("built", {"attempt": lease["attempt"], "modules": []})
    metric_rows(trial, lease, resumed)
    saved = trial.checkpoint(10, lease["attempt"])
    draft = saved.begin()
    draft.model.write_bytes(b"weights")
    draft.seal()
    saved.commit(draft)
    trial.write("status", status(trial, lease, state="done"))
    trial.write("summary", summary(trial, lease, loss), guard=trial.guard(lease["lease"]))
    rundir.publish(trial, lease["attempt"], lease["lease"])
    end = {"state": "done", "class": None, "code": 0, "message": "", "traceback": None, "step": 10}
    attempt.write("exit", end)
    assert log.append(trial.name, journal.TrialState.DONE, lease=lease["lease"], reason="done")
    return lease
