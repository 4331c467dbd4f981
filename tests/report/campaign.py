# SPDX-License-Identifier: MIT
"""Writes small campaigns with known curves through rundir's own writers, so that each is a valid folder."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from ablab import plan
from ablab.journal import Journal, TrialState
from ablab.rundir import Campaign, Rows, TrialDir, publish

STEPS = 200
EVERY = 20
STUDY = """base demo
seeds 6 paired
metric val_loss final
question Does a reciprocal path lower the loss?
[R0] Baseline
[R1] RA
CONFIG_ATTN_RECIPROCAL=y
[R2 : R1] RA + RA-CT
CONFIG_ATTN_RACT=y
"""
TITLES = {"R0": "Baseline", "R1": "RA", "R2": "RA + RA-CT"}
REGISTRATION = {
    "question": "Does a reciprocal path lower the loss?",
    "margin": None,
    "alpha": 0.05,
    "sides": 2,
    "placebo": 0,
    "looks": [],
    "failures": "block",
    "paired": True,
    "metric": {"key": "val_loss", "mode": "final"},
    "budget": "steps",
    "seeds": 6,
    "as_written": True,
}
Arm = tuple[str | None, Mapping[str, str]]


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def loss(final: float, step: int) -> float:
    """A curve from ln 256 at step 0 down to exactly `final` at the last step."""
    start = math.log(256)
    fall = (1 - math.exp(-5 * step / STEPS)) / (1 - math.exp(-5))
    return start + (final - start) * fall


def write(
    results: Path,
    finals: Callable[[Arm, int], float],
    *,
    name: str = "ra-20260101-abcdef",
    arms: Sequence[Arm] = (("R0", {}), ("R1", {}), ("R2", {})),
    seeds: Sequence[int] | Mapping[str, Sequence[int]] = (1, 2, 3, 4, 5, 6),
    contrasts: Sequence[tuple[str, str]] = (("R1", "R0"), ("R2", "R1")),
    fates: Mapping[str, str] | None = None,
    titles: Mapping[str, str] = TITLES,
    study: str | None = STUDY,
    make_vars: Mapping[str, str] | None = None,
    symbols: Callable[[Arm], Mapping[str, str]] = lambda arm: {"MODEL_GPT": "y", "OPT_LR": '"6e-4"'},
    facts: Callable[[Arm], Mapping[str, Any]] = lambda arm: {},
    outcome: Callable[[Arm], Mapping[str, Any]] = lambda arm: {},
    skipped: Sequence[Mapping[str, Any]] = (),
    base: Mapping[str, str] | None = None,
    **registration: Any,
) -> Campaign:
    """A campaign in which the trial of an arm and seed ends with val_loss `finals(arm, seed)`.

    `fates` maps a trial id to a state other than done, `queued` and `running` included.  `facts` are
    changes of the manifest, `outcome` those of the summary; its `step_s` are seconds of one step, its `rows`
    further metrics of a step.
    """
    rounds = sorted({s for arm in arms for s in _seeds(seeds, arm)})
    points = [(arm, seed) for seed in rounds for arm in arms if seed in _seeds(seeds, arm)]
    records = [_record(arm, seed, titles) for arm, seed in points]
    content = {
        "name": name,
        "created": "2026-01-01T00:00:00Z",
        "kind": "ablation" if study else "single",
        "plan": sha("plan"),
        "study": {"name": "ra", "text": study, "sha256": sha(study)} if study else None,
        "base": {
            "layers": [{"origin": "defconfig", "sha256": sha("base")}],
            "config": _lines(base or {"MODEL_GPT": "y"}),
        },
        "make_vars": dict(make_vars or {}),
        "trials": records,
        "skipped": list(skipped),
        "contrasts": [list(pair) for pair in contrasts],
        "registration": {**REGISTRATION, **registration},
        "auto": {},
        "policy": {"keep_going": True, "retries": {}, "grace_s": 120, "hang_s": 600},
        "code": {"commit": "c" * 40, "dirty": False, "patch": None, "tree": sha("tree")},
        "data": {"name": "synth", "sha256": sha("data"), "tokens": 1000},
        "check": {"verdict": "passed", "sha256": sha("verdict")},
        "executor": "local",
    }
    configs = {}
    for (arm, seed), r in zip(points, records, strict=True):
        configs[f"{r['id']}-{r['hash'][:8]}"] = _lines({**symbols(arm), "TRAIN_SEED": str(seed)})
    campaign = Campaign.create(results, name, content, configs)
    journal = Journal.of(campaign)
    for (arm, seed), trial in zip(points, campaign.trials(), strict=True):
        fate = (fates or {}).get(trial.record["id"], "done")
        if fate != "queued":
            run(journal, trial, finals(arm, seed), fate, facts(arm), outcome(arm))
    return campaign


def amend(campaign: Campaign, arms: Sequence[Arm], seed: int, finals: Callable[[Arm, int], float], why: str) -> None:
    """Add one seed of some arms, and run it."""
    records = [_record(arm, seed, TITLES) for arm in arms]
    journal = Journal.of(campaign)
    payload = {"created": "2026-01-02T00:00:00Z", "reason": why, "trials": records}
    campaign.amend(payload, {f"{r['id']}-{r['hash'][:8]}": _lines({"TRAIN_SEED": str(seed)}) for r in records})
    journal.note("amend", why)
    for arm, trial in zip(arms, campaign.trials()[-len(arms) :], strict=True):
        run(journal, trial, finals(arm, seed))


def _lines(symbols: Mapping[str, str]) -> str:
    return "".join(f"# CONFIG_{k} is not set\n" if v == "n" else f"CONFIG_{k}={v}\n" for k, v in symbols.items())


def _seeds(seeds: Any, arm: Arm) -> Sequence[int]:
    return seeds[plan.arm_text(*arm)] if isinstance(seeds, Mapping) else seeds


def _record(arm: Arm, seed: int, titles: Mapping[str, str]) -> dict[str, Any]:
    step, axes = arm
    id = "-".join([step or "base", *axes.values(), f"s{seed}"]).lower().replace("+", "")
    return {
        "id": id,
        "hash": sha(id),
        "group": sha(plan.arm_text(step, axes)),
        "step": step,
        "title": " ".join(t for t in (titles.get(step or ""), plan.arm_text(None, axes)) if t) or "single",
        "axes": dict(axes),
        "seed": seed,
        "overrides": [f"CONFIG_{k}={v}" for k, v in axes.items()],
        "superseded": [],
        "resources": {"gpus": 0, "cpus": 1, "mem_gib": 0.1},
        "forecast": None,
    }


def run(
    journal: Journal,
    trial: TrialDir,
    final: float,
    fate: str = "done",
    facts: Mapping[str, Any] = {},
    outcome: Mapping[str, Any] = {},
) -> None:
    """One attempt of a queued trial; all that is not `done` stops half way."""
    lease = journal.claim(trial)
    number, last = lease["attempt"], STEPS if fate == "done" else STEPS // 2
    step_s = outcome.get("step_s", 0.1)
    attempt = trial.attempt(number)
    ticks = count()
    header = {"trial": trial.name, "attempt": number, "resumed_at_step": 0}
    rows = Rows(attempt.metrics, "metrics", header, clock=lambda: float(next(ticks)))
    for step in range(0, last + 1, EVERY):
        axes = {"tokens": step * 768, "train_s": step * step_s, "wall_s": step * 2 * step_s, "flops": step * 1e6}
        m = {"val_loss": loss(final, step), "train_loss": loss(final, step) - 0.1}
        rows.row(step, m | outcome.get("rows", lambda step: {})(step), **axes)
    rows.close()
    trial.write("manifest", {**_manifest(trial, lease), **facts})
    if fate == "running":
        return
    if fate == "done":
        trial.write("built", {})
        kept = {k: v for k, v in outcome.items() if k != "rows"}
        trial.write("summary", {**_summary(trial, number, final), **kept})
        publish(trial, number, lease["lease"])
    cls = {"failed": "exception", "diverged": None}.get(fate)
    journal.append(trial.name, TrialState(fate), reason="done" if fate == "done" else f"{fate} at step {last}", cls=cls)


def _summary(trial: TrialDir, attempt: int, final: float) -> dict[str, Any]:
    clocks = ("startup_s", "compile_s", "warmup_s", "eval_s", "checkpoint_s", "data_s", "other_s")
    return {
        "trial": trial.record["id"],
        "attempt": attempt,
        "attempts": attempt,
        "stop": "budget",
        "primary": {"key": "val_loss", "value": final, "direction": "lower", "step": STEPS},
        "final": {"val_loss": final, "train_loss": final - 0.1},
        "best": {"val_loss": {"value": final, "step": STEPS}},
        "used": {
            "steps": STEPS,
            "tokens": STEPS * 768,
            "train_s": 20.0,
            **dict.fromkeys(clocks, 0.0),
            "total_s": 36.0,
        },
        "perf": {
            "tok_per_s": 7680.0,
            "step_ms_p50": 100.0,
            "step_ms_p95": 110.0,
            "mfu": None,
            "peak_mem_bytes": 2**28,
        },
        "model": {"params": 800_000, "trainable": 800_000, "fingerprint": sha("model")},
        "rates": [[round(p * STEPS) or 1, p, 1e-3 * (1 - 0.9 * p)] for p in (0.0, 0.25, 0.5, 0.75, 1.0)],
        "contracts": [],
        "forecast": None,
    }


def manifest_facts() -> dict[str, Any]:
    """The parts of a manifest that are equal in all trials."""
    resolved = {
        "compile": "off",
        "amp": "off",
        "tf32": False,
        "cudnn_benchmark": False,
        "attention_kernel": "math",
    }
    return {
        "resolved": {**resolved, "threads": 1, "workers": 0},
        "batch": {
            "micro": 12,
            "accum": 1,
            "world": 1,
            "effective": 12,
            "seq_len": 64,
            "tokens_per_step": 768,
        },
        "budget": {"kind": "steps", "limit": float(STEPS)},
        "data": {
            "name": "synth",
            "sha256": sha("data"),
            "tokenizer": None,
            "split": sha("split"),
            "order_seed": 0,
        },
        "code": {"commit": "c" * 40, "dirty": False, "patch": None, "tree": sha("tree")},
        "software": {
            "python": "3.11",
            "torch": "2.13",
            "cuda": None,
            "hip": None,
            "driver": None,
            "kernel": "6.1",
        },
        "devices": [],
        "cpu": {"model": "Test CPU", "cores": [0]},
        "env": {},
        "neighbours": [],
        "resume": None,
    }


def _manifest(trial: TrialDir, lease: Mapping[str, Any]) -> dict[str, Any]:
    r = trial.record
    return {
        "campaign": trial.campaign.name,
        "trial": {k: r[k] for k in ("id", "hash", "group")},
        "attempt": lease["attempt"],
        "lease": lease["lease"],
        "created": "2026-01-01T00:00:00Z",
        "config": {},
        "seeds": {"train": r["seed"], "data": r["seed"], "eval": 0},
        **manifest_facts(),
    }
