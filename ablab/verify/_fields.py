# SPDX-License-Identifier: MIT
"""The fields of a certificate: where each is read, by which rule it is held, and which treatment may change it."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ablab import rundir
from ablab.report.load import Trial

GROUPS = (
    *("treatment", "budget", "batch", "optimizer", "schedule", "model", "pruning", "data", "evaluation", "execution"),
    *("software", "hardware", "code", "effects", "statistics", "integrity", "mirror"),
)
BUILD = "MODEL_ ATTN_ MLP_"
# group.name | rule | where | prefixes of the symbols whose treatment may change it | marks
# E equal in all arms and seeds; T may differ between arms as the declared treatment, never inside one; R recorded;
# C a check of its own.  Where: file.key.key, config.SYMBOL, FAMILY_* or @reader below.  A `?` in front: null is a value
# on a CPU, where there is no such thing.  Marks: `seed` compared seed by seed; `steps` only recorded where the budget
# is a time, under which trials of equal worth differ; a number is the relative slack.
_TABLE = f"""
budget.stop_rule | E | manifest.budget.kind
budget.limit | E | manifest.budget.limit
budget.reason | E | summary.stop
budget.steps | R | summary.used.steps
budget.tokens | R | summary.used.tokens
budget.train_s | R | summary.used.train_s
budget.wall_s | R | summary.used.total_s
budget.flops | R | summary.used.flops
batch.effective | E | manifest.batch.effective
batch.sequence | E | manifest.batch.seq_len
batch.micro | T | manifest.batch.micro | TRAIN_BATCH_MICRO
batch.accumulation | T | manifest.batch.accum | TRAIN_BATCH_MICRO
batch.world | T | manifest.batch.world | SYS_GPUS
batch.resolved_by | R | @resolved_by
optimizer.values | T | OPT_* | OPT_
optimizer.groups | T | built.optimizer | OPT_ {BUILD} SCHED_COUPLING
optimizer.clipping | T | built.clip | OPT_CLIP
optimizer.state_bytes | R | built.state_bytes
schedule.values | T | SCHED_* | SCHED_
schedule.warmup | T | config.SCHED_WARMUP | SCHED_WARMUP
schedule.minimum | T | @last_rate | SCHED_ OPT_ | steps
schedule.rates | T | summary.rates | SCHED_ OPT_ | steps
model.built | T | built.fingerprint | {BUILD} | seed
model.parameters | T | built.params | {BUILD}
model.init | T | @init | {BUILD} | seed
model.ties | T | built.ties | {BUILD}
model.dtypes | E | @dtypes
model.weights | R | @weights
pruning.values | T | PRUNE_* | PRUNE_
pruning.realised | T | @sparsity | PRUNE_ | 0.005
data.id | E | manifest.data.name
data.files | E | manifest.data.sha256
data.tokenizer | E | @tokenizer
data.preprocessing | E | manifest.data.preprocessing
data.split | E | manifest.data.split
data.order_seed | E | manifest.data.order_seed | | seed
data.start | E | @start
data.end | E | summary.used.samples | | steps
evaluation.set | E | built.evaluation.sha256
evaluation.tokens | E | built.evaluation.tokens
evaluation.interval | E | config.EVAL_INTERVAL
evaluation.count | E | @evaluations | | steps
evaluation.checkpoint | E | @rule
evaluation.code | E | @eval_code
execution.compile | T | @compile | SYS_COMPILE
execution.graph_breaks | T | @breaks | SYS_COMPILE {BUILD}
execution.kernel | T | @kernel | ATTN_ MODEL_ SYS_
execution.lse_kernel | T | manifest.resolved.lse_kernel | ATTN_ MODEL_ SYS_
execution.precision | T | manifest.resolved.amp | SYS_AMP
execution.tf32 | T | ?manifest.resolved.tf32 | SYS_TF32
execution.cudnn | T | ?manifest.resolved.cudnn_benchmark | SYS_CUDNN SYS_DETERMINISTIC
execution.determinism | T | manifest.resolved.deterministic | SYS_DETERMINISTIC
execution.threads | T | manifest.resolved.threads | SYS_THREADS
execution.ranks | T | manifest.batch.world | SYS_GPUS
execution.allocator | T | ?manifest.resolved.allocator | SYS_ALLOC
software.python | E | manifest.software.python
software.torch | E | manifest.software.torch
software.toolkit | E | @toolkit
software.driver | E | ?manifest.software.driver
software.lock | E | manifest.software.lock
software.kernel | R | manifest.software.kernel
hardware.model | E | @model
hardware.count | E | @count
hardware.memory | E | @memory
hardware.power_cap | E | @power_cap
hardware.cpu | E | manifest.cpu.model
hardware.uuids | R | @uuids
code.modules | E | manifest.code.modules
code.commit | R | manifest.code.commit
"""
EQUAL_BUDGET = {"steps": "steps", "tokens": "tokens", "epochs": "tokens", "time": "train_s"}
"""Registered budget -> field of the budget group that must be equal."""
LOOSE = {"train_s": 0.01, "flops": 0.01}
# what a treatment of these symbols must have changed, or it had no effect
EFFECTS = {
    "MODEL_": "model.built",
    "ATTN_": "model.built",
    "MLP_": "model.built",
    **dict.fromkeys(("OPT_", "SCHED_", "PRUNE_", "TRAIN_"), "model.weights"),
    "SYS_COMPILE": "execution.compile",
    "SYS_AMP": "execution.precision",
    "SYS_TF32": "execution.tf32",
    "SYS_DETERMINISTIC": "execution.determinism",
    "SYS_THREADS": "execution.threads",
    "EVAL_": "statistics.value",
}


class AbsentError(ValueError):
    """A trial has no record of a field."""


@dataclass(frozen=True, slots=True)
class Field:
    """One line of the table."""

    group: str
    name: str
    rule: str
    where: str
    by: tuple[str, ...]
    per_seed: bool
    steps: bool
    slack: float

    @property
    def full(self) -> str:
        return f"{self.group}.{self.name}"


class Facts:
    """What one done trial left: manifest, built, summary, configuration and rows."""

    def __init__(self, t: Trial, key: str, mode: str, autos: Mapping[str, str]) -> None:
        self.t, self.key, self.mode, self.autos = t, key, mode, autos
        self.files = {"manifest": t.dir.manifest(), "built": t.dir.built(), "summary": t.summary}
        self.touched: set[str] = set()
        """Records that were asked for."""

    @property
    def gpu(self) -> bool:
        return bool(self.get("manifest.devices"))

    @cached_property
    def config(self) -> dict[str, str]:
        """Symbol -> literal, as the trial settled it."""
        return {name: entry["text"] for name, entry in self.get("manifest.config").items()}

    def read(self, field: Field) -> Any:
        """The value of a field.  Raises AbsentError."""
        where = field.where.removeprefix("?")
        try:
            if where.startswith("@"):
                value = READERS[where[1:]](self)
            elif where.endswith("*"):
                value = {n: v for n, v in self.config.items() if n.startswith(where[:-1])} or None
            elif where.startswith("config."):
                value = self.config[where.removeprefix("config.")]
            else:
                value = self.get(where)
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            raise AbsentError(where) from error
        if value is None and not (field.where.startswith("?") and not self.gpu):
            raise AbsentError(where)
        return value

    def get(self, where: str) -> Any:
        self.touched.add(where)
        file, *keys = where.split(".")
        value = self.files[file]
        for name in keys:
            value = value[name]
        return value


def short(value: Any) -> str:
    """A hash that stands for a value too long to print."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _init(f: Facts) -> dict[str, Any]:
    tensors = ((m["path"], name, t) for m in f.get("built.modules") for name, t in m["tensors"].items())
    return {f"{path}.{name} {t['shape']}": t["sha256"] for path, name, t in tensors} or None


def _dtypes(f: Facts) -> list[str] | None:
    return sorted({t["dtype"] for m in f.get("built.modules") for t in m["tensors"].values()}) or None


def _weights(f: Facts) -> str:
    return f.t.dir.saved()[0].read("checkpoint")["files"]["model.safetensors"]["sha256"]


def _sparsity(f: Facts) -> float:
    return f.t.points("sparsity")[-1][1]


def _start(f: Facts) -> int:
    """Samples before the first row that counts."""
    first = f.t.rows(f.key)[0]["attempt"]
    header = next(rundir.lines(f.t.dir.attempt(first).metrics, "metrics"))
    return header["resumed_at_step"] * f.get("manifest.batch.effective")


def _evaluations(f: Facts) -> int | None:
    return len(f.t.points(f.key)) or None


def _rule(f: Facts) -> str:
    """Which value is reported, and of which moment it is."""
    primary = f.get("summary.primary")
    known = {"final": f.get("summary.used.steps"), "min": primary["step"], "max": primary["step"]}[f.mode]
    at = "" if primary["step"] == known else f", but of step {primary['step']}"
    return f"{primary['key']} {f.mode}{at}"


def _compile(f: Facts) -> str:
    asked, graphs = f.get("manifest.resolved.compile"), (f.get("summary.compile") or {}).get("graphs", 0)
    made = "on" if graphs else "off"
    return made if asked == made else f"asked {asked}, {graphs} graphs compiled"


def _breaks(f: Facts) -> int:
    found = f.get("summary.compile")
    return found["breaks"] if found else 0


def _toolkit(f: Facts) -> str:
    cuda, hip = f.get("manifest.software.cuda"), f.get("manifest.software.hip")
    if f.gpu and not (cuda or hip):
        raise AbsentError("cuda or hip")
    return " ".join(f"{name} {v}" for name, v in (("CUDA", cuda), ("ROCm", hip)) if v) or "none"


def _tokenizer(f: Facts) -> str:
    return f.get("manifest.data.tokenizer") or "none"


def _devices(key: str) -> Callable[[Facts], Any]:
    def read(f: Facts) -> Any:
        found = [d[key] for d in f.get("manifest.devices")]
        if None in found:
            raise AbsentError(key)
        return found if f.gpu else "no GPU"

    return read


READERS: dict[str, Callable[[Facts], Any]] = {
    "resolved_by": lambda f: "auto" if any("TRAIN_BATCH_MICRO=" in a for a in f.autos) else "user",
    "last_rate": lambda f: f.get("summary.rates")[-1][2],
    "init": _init,
    "dtypes": _dtypes,
    "weights": _weights,
    "sparsity": _sparsity,
    "start": _start,
    "evaluations": _evaluations,
    "rule": _rule,
    "eval_code": lambda f: f.get("manifest.code.modules")["ablab.evaluate"],
    "kernel": lambda f: f.get("manifest.resolved.attention_kernel") or "none",
    "compile": _compile,
    "breaks": _breaks,
    "toolkit": _toolkit,
    "tokenizer": _tokenizer,
    "model": lambda f: _devices("name")(f) if f.gpu else f.get("manifest.cpu.model"),
    "count": lambda f: len(f.get("manifest.devices")) or len(f.get("manifest.cpu.cores")),
    "memory": lambda f: _devices("memory_bytes")(f) if f.gpu else f.get("manifest.cpu.memory_bytes"),
    "power_cap": _devices("power_cap_w"),
    "uuids": _devices("uuid"),
}


def _fields() -> tuple[Field, ...]:
    found = []
    for line in _TABLE.strip().splitlines():
        full, rule, where, by, marks = [*(part.strip() for part in line.split("|")), "", ""][:5]
        group, _, name = full.partition(".")
        slack = next((float(m) for m in marks.split() if m[0].isdigit()), LOOSE.get(name, 0.0))
        words = marks.split()
        found.append(Field(group, name, rule, where, tuple(by.split()), "seed" in words, "steps" in words, slack))
    return tuple(found)


FIELDS = _fields()
