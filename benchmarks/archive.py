# SPDX-License-Identifier: MIT
"""Reading many trials: `python -m benchmarks.archive [--trials 5000 --rows 2000 --only .. --keep DIR]`.

Writes a campaign of finished trials at the file layer, then times verbs on it, each in a process of its own:
seconds on the clock, CPU seconds of all its processes, most resident memory of one of them.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ablab import journal, rundir

SEEDS, POINTS, KINDS = 10, 10, 8
CLOCKS = ("startup_s", "compile_s", "warmup_s", "eval_s", "checkpoint_s", "data_s", "other_s")
EVAL_EVERY = 10
MACHINE: dict[str, Any] = {
    "resolved": {"compile": "off", "amp": "off", "tf32": False, "cudnn_benchmark": False, "attention_kernel": "math"}
    | {"threads": 1, "workers": 0},
    "batch": {"micro": 8, "accum": 1, "world": 1, "effective": 8, "seq_len": 64, "tokens_per_step": 512},
    "budget": {"kind": "steps", "limit": 200.0},
    "data": {"name": "synth", "sha256": "0" * 64, "tokenizer": None, "split": "0" * 64, "order_seed": 0},
    "software": {"python": "3.11", "torch": "2.13", "cuda": None, "hip": None, "driver": None, "kernel": "6.1"},
    **{"devices": [], "cpu": {"model": "a CPU", "cores": [0]}, "env": {}, "neighbours": [], "resume": None},
}
CHILD = """import resource, sys, time
start = time.perf_counter()
from ablab.__main__ import main
code = main(sys.argv[1:])
use = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
cpu, kib = sum(u.ru_utime + u.ru_stime for u in use), max(u.ru_maxrss for u in use)
print(code, time.perf_counter() - start, cpu, kib / 2**20, file=sys.stderr)
"""


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def make(results: Path, trials: int, rows: int) -> rundir.Campaign:
    """A campaign of `trials` done trials with `rows` rows each."""
    arms = [(f"R{i // POINTS}", {"OPT_LR": f"{i % POINTS + 1}e-4"}) for i in range(trials // SEEDS)]
    records = [_record(step, axes, seed) for step, axes in arms for seed in range(SEEDS)]
    steps = dict.fromkeys(step for step, _ in arms)
    text = "base demo\nmetric val_loss final\n" + "".join(f"[{s}] Step {s}\nCONFIG_ATTN_LENS=y\n" for s in steps)
    code = {"commit": None, "dirty": True, "patch": None, "tree": sha("tree")}
    rule = {"margin": None, "alpha": 0.05, "sides": 2, "placebo": 0, "looks": [], "failures": "block", "paired": True}
    metric = {"metric": {"key": "val_loss", "mode": "final"}, "budget": "steps", "seeds": SEEDS, "as_written": True}
    content = {
        "created": "2026-01-01T00:00:00Z",
        "kind": "ablation",
        "plan": sha("plan"),
        "study": {"name": "archive", "text": text, "sha256": sha(text)},
        "base": {"layers": [{"origin": "defconfig", "sha256": sha("base")}], "config": "CONFIG_MODEL_GPT=y\n"},
        "make_vars": {},
        "trials": records,
        "skipped": [],
        "contrasts": [["R1 OPT_LR=1e-4", "R0 OPT_LR=1e-4"]],
        "registration": {"question": "", **rule, **metric},
        "auto": {},
        "policy": {"keep_going": True, "retries": {}, "grace_s": 120, "hang_s": 600},
        "code": code,
        "data": {"name": "synth", "sha256": sha("data"), "tokens": 1000},
        "check": {"verdict": "passed", "sha256": None},
        "executor": "local",
    }
    configs = {rundir.folder_of(r): "CONFIG_MODEL_GPT=y\n" * 150 for r in records}
    campaign = rundir.Campaign.create(results, "archive", {**content, "name": "archive"}, configs)
    curves = [_rows(rows, kind) for kind in range(KINDS)]
    log = rundir.Rows(campaign.journal, "journal", {})
    owner, states = {"host": "h", "pid": 1}, ("queued", "running", "done")
    for i, trial in enumerate(campaign.trials()):
        _trial(campaign, trial, i + 1, curves[i % KINDS], rows, code)
        for n, (before, after) in enumerate(zip(states, states[1:], strict=False)):
            change = {"trial": trial.name, "attempt": 1, "lease": i + 1, "from": before, "to": after, "reason": "-"}
            log.line({"seq": 2 * i + n + 1, "wall": 0.0, **change, **owner})
    log.close()
    return campaign


def _record(step: str, axes: dict[str, str], seed: int) -> dict[str, Any]:
    id = f"{step}-{axes['OPT_LR']}-s{seed}".lower()
    parts = {"id": id, "hash": sha(id), "group": sha(step), "step": step, "title": f"Step {step}", "axes": axes}
    rest = {"overrides": [f"CONFIG_OPT_LR={axes['OPT_LR']}"], "superseded": [], "forecast": None}
    return {**parts, "seed": seed, "resources": {"gpus": 0, "cpus": 1, "mem_gib": 0.1}, **rest}


def _rows(rows: int, kind: int) -> bytes:
    """Rows as the trainer writes them: a loss each, a validation loss every tenth."""
    lines = []
    for i in range(rows):
        loss = 3 + 5 / (i + kind + 1)
        m = {
            "train_loss": loss,
            "learning_rate": 6e-4 / (i + 1),
            "grad_norm": 1 / loss,
            "train/tok_per_sec": 1e5 / loss,
        }
        if i % EVAL_EVERY == 0 or i == rows - 1:
            m["val_loss"] = loss + 0.1
        axes = {"step": i, "tokens": i * 524288, "train_s": i / 7, "wall_s": i / 6, "flops": i * 4.1e14}
        lines.append(json.dumps({"q": i, "t": i / 5, **axes, "m": m, "bad": []}, separators=(",", ":")))
    return ("\n".join(lines) + "\n").encode()


def _trial(
    campaign: rundir.Campaign, trial: rundir.TrialDir, lease: int, rows: bytes, count: int, code: dict[str, Any]
) -> None:
    """The files of a done trial, without waiting for the disk as the real writers do."""

    def put(kind: str, payload: dict[str, Any]) -> None:
        trial.file(kind).write_text(json.dumps({"schema": f"ablab.{kind}/1", **payload}, indent=1))

    attempt = trial.attempt(1)
    attempt.path.mkdir()
    head = {"schema": "ablab.metrics/1", "trial": trial.name, "attempt": 1, "resumed_at_step": 0}
    attempt.metrics.write_bytes(json.dumps(head).encode() + b"\n" + rows)
    put("lease", {"lease": lease, "attempt": 1, "first": 1, "fresh": True, **journal.owner(1), "executor": "local"})
    last = json.loads(rows.splitlines()[-1])
    used = {"steps": count, "tokens": last["tokens"], "train_s": last["train_s"], "total_s": last["wall_s"]}
    perf = {"tok_per_s": 1e5, "step_ms_p50": 1.0, "step_ms_p95": 2.0, "mfu": None, "peak_mem_bytes": 2**28}
    primary = {"key": "val_loss", "value": last["m"]["val_loss"], "direction": "lower", "step": last["step"]}
    tensor = {"weight": {"shape": [64, 64]}}
    modules = [{"path": f"blocks.{i}", "class": "Block", "tensors": tensor} for i in range(48)]
    put("built", {"params": 1, "modules": modules})
    put(
        "manifest",
        {
            "campaign": campaign.name,
            "trial": {k: trial.record[k] for k in ("id", "hash", "group")},
            **{"attempt": 1, "lease": lease, "created": "2026-01-01T00:00:00Z", "code": code},
            "config": {f"TRAIN_{i}": {"value": i, "text": str(i), "origin": "default"} for i in range(150)},
            **{"seeds": dict.fromkeys(("train", "data", "eval"), trial.record["seed"]), **MACHINE},
        },
    )
    put(
        "summary",
        {
            **{"trial": trial.record["id"], "attempt": 1, "attempts": 1, "stop": "budget", "primary": primary},
            **{"final": last["m"], "best": {"val_loss": {"value": last["m"]["val_loss"], "step": last["step"]}}},
            **{"used": {**dict.fromkeys(CLOCKS, 0.0), **used}, "perf": perf, "contracts": [], "forecast": None},
            "model": {"params": 1, "trainable": 1, "fingerprint": sha("model")},
        },
    )
    names = ["config", "manifest.json", "built.json", "summary.json", "attempts/1/metrics.jsonl"]
    files = {name: rundir.stamp(trial.path / name) for name in names}
    put(
        "done", {"trial": trial.record["hash"], "attempt": 1, "lease": lease, "campaign": campaign.hash, "files": files}
    )


def timed(*words: str) -> dict[str, float]:
    """Seconds, CPU seconds and GiB of a verb."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    *_, exit, wall, cpu, gib = done.stderr.split()
    assert exit == "0", done.stderr
    return {"s": float(wall), "cpu_s": float(cpu), "gib": float(gib)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=5000)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--only", default="cold warm ls series thin report")
    parser.add_argument("--keep", type=Path, help="make the campaign here, or use the one that is here")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        results = args.keep or Path(folder)
        if not (results / "archive").exists():
            start = time.perf_counter()
            make(results, args.trials, args.rows)
            print(f"made {args.trials} trials of {args.rows} rows in {time.perf_counter() - start:.0f} s", flush=True)
            time.sleep(3)  # what was written a moment ago is not kept in the index
        out = f"O={results}"
        thousand = "archive/r1?-*"
        verbs = {
            "cold": ["keys", "archive", out],
            "warm": ["keys", "archive", out],
            "ls": ["ls", "archive", out, "--where", "state=done and val_loss<4", "--sort", "value"],
            "series": ["series", thousand, "KEY=val_loss", "FORMAT=csv", out],
            "thin": ["series", thousand, "KEY=train_loss", "POINTS=50", out],
            "report": ["report", "archive", out],
        }
        for name in args.only.split():
            if name == "cold":
                subprocess.run(["rm", "-rf", str(results / ".index")], check=True)
            print(f"{name:8}", *(f"{v:8.2f} {k}" for k, v in timed(*verbs[name]).items()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
