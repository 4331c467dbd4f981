# SPDX-License-Identifier: MIT
"""A fair comparison at the file layer, whose every recorded value a test can change; DONE then vouches for that."""

import json
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ablab import rundir
from ablab.rundir import Campaign, TrialDir
from tests.report import campaign
from tests.report.campaign import sha

ARMS = (("R0", {}), ("R1", {}))
SEEDS = (1, 2, 3, 4, 5, 6)
BASE = {
    "ATTN_RECIPROCAL": "n",
    "DATA_SYNTH": "y",
    "EVAL_INTERVAL": "20",
    "MODEL_GPT": "y",
    "OPT_LR": '"1e-3"',
    "PRUNE_NONE": "y",
    "SCHED_COSINE": "y",
    "SCHED_WARMUP": "10",
    "SYS_COMPILE_OFF": "y",
    "SYS_COMPILE_ON": "n",
    "TRAIN_LOG_STEPS": "20",
}
TREATMENTS = {
    "attention": {"ATTN_RECIPROCAL": "y"},
    "optimizer": {"OPT_LR": '"2e-3"'},
    "compile": {"SYS_COMPILE_OFF": "n", "SYS_COMPILE_ON": "y"},
    "gpu": {"ATTN_RECIPROCAL": "y"},
}
GPU = {"kind": "cuda", "name": "NVIDIA A10G", "uuid": "GPU-1", "memory_bytes": 24 << 30, "power_cap_w": 300.0}
MODULES = {name: sha(name) for name in ("ablab.train", "ablab.evaluate", "ablab.record")}


def finals(arm, seed):
    return 2.0 + 0.01 * seed - (0.1 + 0.001 * (seed * 5 % 7) if arm[0] == "R1" else 0)


def write(
    results: Path, treatment: str = "attention", remote: str = "", commit: str = "c" * 40, **facts: Any
) -> Campaign:
    """A campaign of two arms and six seeds, in which the arms differ by nothing but their treatment."""
    changed = TREATMENTS[treatment]
    symbols = lambda arm: {**BASE, **(changed if arm[0] == "R1" else {})}
    made = campaign.write(
        results, finals, arms=ARMS, seeds=SEEDS, contrasts=[("R1", "R0")], symbols=symbols, base=BASE, **facts
    )
    content = json.loads(made.file("campaign").read_text())
    content["code"]["commit"] = commit
    for record in content["trials"]:
        on = record["step"] == "R1"
        record["overrides"] = [f"CONFIG_{k}={v}" for k, v in changed.items() if v != "n"] if on else []
        record["overrides"].append(f"CONFIG_TRAIN_SEED={record['seed']}")
    made.file("campaign").write_text(json.dumps(content))
    made = Campaign.open(made.path)
    for trial in made.trials():
        on = trial.record["step"] == "R1"
        values = symbols((trial.record["step"], {})) | {"TRAIN_SEED": str(trial.record["seed"])}
        complete(trial, values, on and treatment in ("attention", "gpu"), on and treatment == "compile", remote, commit)
        if treatment == "gpu":
            as_gpu(trial)
        stamp(trial)
    return made


def complete(trial: TrialDir, values: Mapping[str, str], other: bool, compiled: bool, remote: str, commit: str) -> None:
    """Everything that a trial records today."""
    seed, name = trial.record["seed"], trial.record["id"]
    patch = lambda kind, **more: _update(trial.file(kind), lambda body: _merge(body, more))
    patch(
        "manifest",
        config={k: {"value": v, "text": v, "origin": "default"} for k, v in values.items()},
        resolved={"lse_kernel": "cpu", "deterministic": False, "allocator": None, "tf32": None, "cudnn_benchmark": None}
        | ({"compile": "on"} if compiled else {}),
        data={"preprocessing": sha("preprocessing"), "order_seed": seed, "tokenizer": sha("tokenizer")},
        code={"commit": commit, "modules": MODULES, "remote": remote},
        software={"lock": sha("lock")},
        cpu={"memory_bytes": 1 << 34},
    )
    tensors = {"weight": {"shape": [4, 4], "dtype": "float32", "sha256": sha(f"init {seed}")}}
    patch(
        "built",
        fingerprint=sha(f"model {seed} {other}"),
        params=1000 + 100 * other,
        trainable=1000,
        ties={"head": "wte.weight"},
        optimizer=[{"name": "decay", "weight_decay": 0.1}],
        clip=1.0,
        state_bytes=8000,
        evaluation={"sha256": sha("set"), "tokens": 512, "bytes": 512},
        modules=[{"path": "h.0", "class": "Linear", "tensors": tensors}],
    )
    names = ("optim/groups", "batch/product", "schedule/rate", "eval/count", "prune/dense")
    patch(
        "summary",
        used={"samples": 200 * 12, "flops": 2e8},
        compile={"graphs": 2, "breaks": 0} if compiled else None,
        contracts=[{"name": n, "ok": True, "expected": 1, "measured": 1} for n in names],
    )
    rows(trial, lambda row: row["m"].update(sparsity=0.0))
    place = trial.checkpoint(campaign.STEPS, 1)
    temporary = place.begin()
    temporary.model.write_bytes(f"weights of {name}".encode())
    temporary.seal()
    place.commit(temporary)


def as_gpu(trial: TrialDir) -> None:
    resolved = {"tf32": True, "cudnn_benchmark": False, "allocator": "native expandable_segments:True"}
    more = {"software": {"cuda": "12.8", "driver": "570.1"}, "resolved": resolved, "devices": [GPU]}
    _update(trial.file("manifest"), lambda body: _merge(body, more))
    telemetry(trial)


def telemetry(trial: TrialDir, times: Sequence[float] = range(25), **reading: Any) -> None:
    """Samples of the first attempt, a second apart; its rows lie in t = 2 .. 24."""
    header = {"schema": "ablab.telemetry/1", "trial": trial.name, "attempt": 1, "period_ms": 1000}
    readings = {GPU["uuid"]: {"busy_pct": 90, "throttle": [], "shared": False, **reading}}
    lines = [header, *({"t": float(t), "devices": readings, "host": {}} for t in times)]
    trial.attempt(1).telemetry.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def rows(trial: TrialDir, change: Callable[[dict], Any], wanted: Callable[[dict], bool] = lambda row: True) -> None:
    """Change rows of the first attempt, not its header."""
    path = trial.attempt(1).metrics
    head, *lines = path.read_text().splitlines()
    found = [json.loads(line) for line in lines]
    for row in filter(wanted, found):
        change(row)
    path.write_text("\n".join([head, *map(json.dumps, found)]) + "\n")


def header(trial: TrialDir, **more: Any) -> None:
    path = trial.attempt(1).metrics
    head, rest = path.read_text().split("\n", 1)
    path.write_text(json.dumps({**json.loads(head), **more}) + "\n" + rest)


def put(trial: TrialDir, where: str, value: Any) -> None:
    """Set `manifest.batch.micro` and the like; a callable makes the new value of the old one, ... removes it."""
    kind, *keys = where.split(".")

    def change(body: Any) -> None:
        for key in keys[:-1]:
            body = body[int(key) if isinstance(body, list) else key]
        last = int(keys[-1]) if isinstance(body, list) else keys[-1]
        if value is ...:
            del body[last]
        else:
            body[last] = value(body[last]) if callable(value) else value

    _update(trial.file(kind), change)


def set_symbol(trial: TrialDir, name: str, text: str | None, planned: bool = True) -> None:
    """A symbol of the manifest and, if `planned`, of the frozen configuration; None removes it."""

    def change(body: Any) -> None:
        body["config"].pop(name, None)
        if text is not None:
            body["config"][name] = {"value": text, "text": text, "origin": "default"}

    _update(trial.file("manifest"), change)
    if planned:
        lines = [line for line in trial.config.read_text().splitlines() if f"CONFIG_{name}" not in line.split("=")[0]]
        lines += [] if text is None else [f"CONFIG_{name}={text}"]
        trial.config.write_text("\n".join(lines) + "\n")


def _update(path: Path, change: Callable[[Any], Any]) -> None:
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))


def _merge(body: dict, more: Mapping[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(body.get(key), dict) and isinstance(value, Mapping) and key not in ("config", "modules"):
            _merge(body[key], value)
        else:
            body[key] = value


def stamp(trial: TrialDir) -> None:
    """Make DONE vouch for the files as they are now."""
    done = json.loads(trial.file("done").read_text())
    found = trial.path.glob("checkpoints/step-*/manifest.json")
    names = {*done["files"], *(str(p.relative_to(trial.path)) for p in found)}
    done["files"] = {name: rundir.stamp(trial.path / name) for name in sorted(names)}
    done["campaign"] = trial.campaign.hash
    trial.file("done").write_text(json.dumps(done))


def copy(source: Campaign, folder: Path) -> Campaign:
    """A copy that a test may change."""
    shutil.copytree(source.path, folder / source.name)
    return Campaign.open(folder / source.name)


def trials(found: Campaign, *steps: str) -> list[TrialDir]:
    return [t for t in found.trials() if t.record["step"] in (steps or ("R0", "R1"))]


def change(found: Campaign, act: Callable[[TrialDir], Any], *steps: str | None, seeds: tuple[int, ...] = SEEDS) -> None:
    """Do something to the trials of these steps, and have DONE vouch for it."""
    for trial in found.trials() if None in steps else trials(found, *steps):
        if trial.record["seed"] in seeds or None in steps:
            act(trial)
            stamp(trial)


def repository(folder: Path) -> tuple[str, str]:
    """(address, commit) of a public repository with one commit on a branch."""
    git(folder.parent, "init", "-q", "-b", "main", str(folder))
    (folder / "README").write_text("code\n")
    (folder / "ablab").mkdir()
    (folder / "studies").mkdir()
    (folder / "studies/ra.study").write_text(campaign.STUDY)
    for name in MODULES:  # whose source is their name
        (folder / "ablab" / f"{name.partition('.')[2]}.py").write_text(name)
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    git(folder, "config", "uploadpack.allowFilter", "true")
    return f"file://{folder}", git(folder, "rev-parse", "HEAD")


def git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()
