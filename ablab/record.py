# SPDX-License-Identifier: MIT
"""What a trial leaves besides rows: manifest.json, built.json, summary.json, what was measured for them, and the
contracts that every trial keeps.

`loop` is the train.Loop throughout.
"""

import hashlib
import json
import math
import resource
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ablab import machine, metrics, provenance, rundir
from ablab.build import Built
from ablab.config import Amp
from ablab.journal import Journal, TrialState
from ablab.kconf import decides
from ablab.plugin import Clause, EffectError
from ablab.rundir import Checkpoint, RunError
from ablab.tensor import kernel, native
from ablab.window import CLOCKS, TRAINING

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
GIB = 1 << 30
FINAL = ("train_loss", "train_perplexity", "train_accuracy", "val_loss", "val_perplexity", "val_bpb", "val_accuracy")
FINAL += ("test_loss", "test_accuracy", "learning_rate", "grad_norm")
BEST = ("val_loss", "val_accuracy", "test_accuracy")
"""What is reported of the best evaluation."""


def begin(loop: Any, data: Mapping[str, Any], place: Checkpoint | None) -> None:
    """Write manifest and built, print what runs.  Raises RunError if a resumed trial would not be the same.

    `data` is the manifest of the prepared set, `place` what the attempt goes on from.
    """
    a = loop.attempt
    what = manifest(loop, data)
    if place:
        before = a.trial.attempt(place.attempt).read("manifest") or {}
        allowed, refused = drift(before, what, a.lease.get("allow_drift") or ())
        if refused:
            text = "\n".join([f"{a.trial.path}: cannot go on from {place.name}, for these differ:", *refused])
            raise RunError(f"{text}\nmake rerun starts at step 0; ALLOW_DRIFT=key,.. goes on and records it")
        stamp = rundir.stamp(place.file("checkpoint"))["sha256"]
        what["resume"] = {"step": place.step, "checkpoint": place.name, "sha256": stamp, "drift": allowed}
    if what["code"]["dirty"]:
        rundir.write_bytes(a.dir.patch, provenance.patch())
    a.dir.write("manifest", what)
    a.write("manifest", what)
    a.write("built", {"attempt": a.dir.number, **built(loop)})
    a.status["devices"] = [d["uuid"] for d in what["devices"]]
    b, r, model = what["batch"], what["resolved"], loop.built
    names = [d["name"] for d in what["devices"]] or [what["cpu"]["model"]]
    print(
        f"trial    {a.trial.record['id']} attempt {a.dir.number}: {a.trial.record['title']}",
        *(f"  {line}" for line in a.settled.minimal().splitlines()),
        f"device   {' '.join(names)}; {', '.join(f'{k} {v}' for k, v in r.items() if v is not None)}",
        f"versions torch {torch.__version__}, python {what['software']['python']}",
        f"batch    {b['micro']} micro x {b['accum']} accumulation x {b['world']} = {b['effective']} samples"
        f" x {b['seq_len']} = {b['tokens_per_step']} {loop.cfg.data.unit} a step",
        f"budget   {what['budget']['limit']} {what['budget']['kind']}, {loop.total or '?'} steps",
        f"model    {model.params} parameters, {model.groups}, fingerprint {model.fingerprint[:12]}",
        f"resumes  {place.name}" if place else "starts   at step 0",
        sep="\n",
        flush=True,
    )


def manifest(loop: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    """manifest.json: what runs, with settings as torch reports them, not as they were asked for."""
    a, t, s, here = loop.attempt, loop.cfg.train, loop.attempt.settled, machine.inventory()
    gpu, length = loop.device.type == "cuda", loop.built.length
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}
    # the line of the file that asked for a value; the trial's own config only repeats it
    origins = a.trial.campaign.content["base"].get("origins", {}) | a.trial.record.get("origins", {})
    entries = Journal.of(a.trial.campaign).replay()
    running = {name for name, entry in entries.items() if entry.state is TrialState.RUNNING}
    return {
        "campaign": a.trial.campaign.name,
        "trial": {k: a.trial.record[k] for k in ("id", "hash", "group")},
        "attempt": a.dir.number,
        "lease": a.lease["lease"],
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "config": {
            symbol: {"value": value, "text": s.text[symbol], "origin": origins.get(symbol, "default")}
            for symbol, value in s.values.items()
        },
        "resolved": {
            "compile": loop.cfg.sys.compile.value,
            "amp": loop.cfg.sys.amp.value,
            "tf32": torch.backends.cuda.matmul.allow_tf32 if gpu else None,
            "cudnn_benchmark": torch.backends.cudnn.benchmark if gpu else None,
            "attention_kernel": _attention_kernel(loop),
            "lse_kernel": kernel.chosen(loop.device) if loop.cfg.attention else None,
            "largest_logits": ("stream" if kernel.InForce.stream else "chunked") if loop.cfg.attention else None,
            "attend_chunk": kernel.InForce.chunk if loop.cfg.attention else None,
            "step_kernel": native.InForce.name,
            "threads": torch.get_num_threads(),
            "workers": 0,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "allocator": _allocator() if gpu else None,
        },
        "batch": {
            "micro": t.batch_micro,
            "accum": loop.accum,
            "world": 1,
            "effective": t.batch_effective,
            "seq_len": length,
            "tokens_per_step": loop.work.tokens,
        },
        "budget": {"kind": t.budget.value, "limit": getattr(t, t.budget.value)},
        "seeds": {"train": t.seed, "data": t.seed, "eval": 0},
        "data": {
            "name": data["name"],
            "sha256": data["sha256"],
            "tokenizer": data["tokenizer"]["sha256"] if "tokenizer" in data else None,
            "split": _hash(data["splits"]),
            "order_seed": t.seed,
            "preprocessing": _hash({k: v for k, v in data.items() if k not in ("name", "sha256", "splits")}),
        },
        "code": {**provenance.code(), "modules": provenance.modules(), "remote": loop.cfg.sys.public_remote},
        "software": provenance.software() | versions,
        "devices": [_device(d) for d in opened(here.devices, loop.device)] if gpu else [],
        "cpu": {"model": here.cpu, "cores": list(here.cores), "memory_bytes": here.memory_bytes},
        "env": provenance.environment(),
        "neighbours": sorted(running - {a.trial.name}),
        "resume": None,
    }


def opened(found: Sequence[machine.Device], device: torch.device) -> list[machine.Device]:
    """The devices of an inventory that torch computes on, by UUID: what else is visible is not the trial's.  All of
    them where torch and the driver name devices differently."""
    name = str(torch.cuda.get_device_properties(device).uuid).lower()
    mine = [d for d in found if name in (d.uuid.lower(), d.uuid.lower().partition("-")[2])]
    return mine or list(found)


def _device(d: machine.Device) -> dict[str, Any]:
    facts = {"kind": d.kind, "name": d.name, "uuid": d.uuid, "memory_bytes": d.memory_bytes}
    return facts | {"power_cap_w": machine.power_cap(d)}


def _allocator() -> str:
    settings = (
        torch._C._accelerator_getAllocatorSettings if hasattr(torch._C, "_accelerator_getAllocatorSettings") else str
    )
    return f"{torch.cuda.memory.get_allocator_backend()} {settings()}".strip()


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _attention_kernel(loop: Any) -> str:
    """What torch picks for causal attention of this head size, dtype and device."""
    if not loop.cfg.attention:
        return "none"
    c, dtype = loop.cfg.model.config, torch.bfloat16 if loop.cfg.sys.amp is Amp.BF16 else torch.float32
    q = torch.empty(1, c.heads, loop.built.length, c.embed // c.heads, dtype=dtype, device=loop.device)
    return KERNELS[torch._fused_sdp_choice(q, q, q, is_causal=True)]


def drift(
    before: Mapping[str, Any], now: Mapping[str, Any], allowed: Iterable[str] = ()
) -> tuple[list[str], list[str]]:
    """(keys that differ and may, a line for each that may not) between the manifests of two attempts."""
    a, b = ({k: v for key in DRIFT for k, v in _facts(key, side).items()} for side in (before, now))
    found = sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))
    fine = [k for k in found if {k, k.partition(".")[0]} & set(allowed)]
    lines = [f"{k}: {a.get(k, 'absent')} before, {b.get(k, 'absent')} now" for k in found if k not in fine]
    return fine, lines


def _facts(key: str, value: Any) -> dict[str, Any]:
    """The values below a key of a manifest, by their full keys."""
    for part in key.split("."):
        value = value[part]
    if key == "config":
        return {f"config.{s}": value[s]["text"] for s in value if decides(s)}
    if isinstance(value, Mapping):
        return {f"{key}.{name}": v for name, v in value.items()}
    return {key: [d["name"] for d in value] if key == "devices" else value}


def built(loop: Any) -> dict[str, Any]:
    """built.json: what was built, measured on the modules."""
    b, e, modules = loop.built, loop.evaluation, []
    if "kv_bytes_per_token" in (facts := b.model.facts()):
        slots = loop.cfg.eval.slots(b.length)
        facts |= {"kv_slots": slots, "kv_bytes": slots * facts["kv_bytes_per_token"]}
    for path, module in b.model.named_modules():
        if found := {n: _tensor(p) for n, p in module.named_parameters(recurse=False)}:
            symbol = {"symbol": s} if (s := vars(module).get("symbol")) else {}
            modules.append({"path": path, "class": type(module).__name__, **symbol, "tensors": found})
    return {
        "fingerprint": b.fingerprint,
        "params": b.params,
        "trainable": b.trainable,
        "groups": b.groups,
        "optimizer": [{k: v for k, v in g.items() if k in _scalars(g)} for g in b.optimizer.param_groups],
        "clip": loop.work.clip,
        "ties": b.model.ties,
        "state_bytes": sum(t.nbytes for s in b.optimizer.state.values() for t in s.values()),
        "flops_per_token": b.flops_per_token,
        **facts,
        "evaluation": {"sha256": e.sha256, "tokens": e.tokens, "bytes": e.bytes},
        "modules": modules,
    }


def _scalars(group: Mapping[str, Any]) -> set[str]:
    """Settings of a parameter group that no step changes."""
    plain = {k for k, v in group.items() if isinstance(v, bool | int | float | str | list | tuple)}
    return plain - {"params", "lr", "initial_lr"}


def _tensor(p: Tensor) -> dict[str, Any]:
    data = p.detach().cpu().contiguous().numpy().data
    return {"shape": list(p.shape), "dtype": str(p.dtype)[6:], "sha256": hashlib.sha256(data).hexdigest()}


def still(loop: Any, symbol: str) -> list[str]:
    """Parameters of a member that nothing has moved, of those that two steps or more were applied to: with their
    first value, or with an optimizer state of zeros, for decay also moves what no gradient ever reached."""
    optimizer, modules = loop.built.optimizer, loop.attempt.trial.built()["modules"]
    stepped = {id(p) for g in optimizer.param_groups if g["count"] > 1 for p in g["params"]}
    first = {f"{m['path']}.{n}": t["sha256"] for m in modules for n, t in m["tensors"].items()}
    found = []
    for path, part in loop.built.model.named_modules():
        mine = part.named_parameters(path) if vars(part).get("symbol") == symbol else ()
        for name, p in mine:
            state = [t for key, t in optimizer.state[p].items() if key != "step"]
            idle = bool(state) and not any(bool(t.any()) for t in state)
            if id(p) in stepped and (idle or _tensor(p)["sha256"] == first.get(name)):
                found.append(name)
    return found


def summary(loop: Any, stop: str) -> dict[str, Any]:
    """summary.json: what came out.  Raises EffectError when the primary metric was never written."""
    a, clocks, work, window = loop.attempt, loop.clocks, loop.work, loop.window
    total_s, train_s, tokens = clocks.total(), clocks.training(), loop.step * work.tokens
    chosen = a.trial.campaign.content["registration"].get("metric") or {"key": "val_loss", "mode": "final"}
    key, mode = chosen["key"], chosen["mode"]
    points = [(r["m"][key], r["step"]) for r in rundir.rows(a.trial, [key]) if r["m"][key] is not None]
    if not points:
        raise EffectError(f"{key}: the primary metric was never written")
    level = "sparsity/target"
    since = rundir.settled_from([(r["step"], r["m"].get(level)) for r in rundir.rows(a.trial, [level])])
    last = [p for p in points if p[1] >= since] or points[-1:]
    value, step = {"final": points[-1], "min": min(last), "max": max(last)}[mode]
    ms = sorted(loop.step_ms) or [1e3 * train_s / loop.step]
    peak, plan = peak_bytes(loop.device), a.trial.record.get("forecast")
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values()) if loop.graphs else 0
    return {
        "trial": a.trial.name,
        "attempt": a.dir.number,
        "attempts": len(a.trial.attempts()),
        "stop": stop,
        "primary": {"key": key, "value": value, "direction": metrics.get(key).better or "lower", "step": step},
        "final": {n: v for n, v in loop.latest.items() if n in FINAL and math.isfinite(v)},
        "best": {n: {"value": loop.chosen[n], "step": loop.best[1]} for n in BEST if n in loop.chosen},
        "used": {
            "steps": loop.step,
            "tokens": tokens,
            "samples": loop.step * work.samples,
            "flops": loop.step * work.flops,
            "train_s": train_s,
            **{f"{n}_s": clocks.spent[n] for n in CLOCKS if n not in TRAINING},
            "total_s": total_s,
        },
        "perf": {
            "tok_per_s": tokens / train_s,
            "step_ms_p50": ms[len(ms) // 2],
            "step_ms_p95": ms[len(ms) * 95 // 100],
            "mfu": loop.step * work.flops / train_s / work.peak if work.peak else None,
            "peak_mem_bytes": peak,
            "epoch_s_mean": window.epoch_s / window.epoch if window.epoch else None,
        },
        "model": {k: getattr(loop.built, k) for k in ("params", "trainable", "fingerprint")},
        "rates": [*loop.probes, loop.applied],
        "compile": {"graphs": loop.graphs, "breaks": breaks} if loop.graphs else None,
        "contracts": list(a.contracts.values()),
        "forecast": {**plan, "actual": [peak / GIB, total_s / 3600]} if plan else None,
    }


def final(loop: Any) -> dict[str, float]:
    """What the last row says of the last and of the best evaluation, and of an epoch's time."""
    found = {"final/val_loss": loop.latest["val_loss"]}
    found |= {f"final/best_{name}": loop.chosen[name] for name in BEST if name in loop.chosen}
    if "val_perplexity" in loop.chosen:
        found["final/best_val_perplexity"] = loop.chosen["val_perplexity"]
    if "test_accuracy" in loop.found:
        found["final/test_accuracy"] = loop.found["test_accuracy"]
    passes = loop.step * loop.work.samples / loop.work.epoch
    return found | {"time/epoch_mean_s": (loop.clocks.training() + loop.clocks.spent["data"]) / passes}


def memory(device: torch.device) -> dict[str, float]:
    """Gauges of memory: of the process its peak so far, of a GPU the peaks since they were last read."""
    m = {"memory/host_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)}
    if device.type == "cuda":
        peak_bytes(device)
        m["memory/allocated_peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        m["memory/reserved_peak_gib"] = torch.cuda.max_memory_reserved() / GIB
        m["memory/num_ooms"] = float(torch.cuda.memory_stats()["num_ooms"] - _ooms[0])
        _ooms[0] += int(m["memory/num_ooms"])
        torch.cuda.reset_peak_memory_stats()
    return m


_ooms = [0]  # torch counts from the start of the process


_peaks = [0]  # `memory` resets what torch counts


def peak_bytes(device: torch.device) -> int:
    """Most memory that was in use: of the device, or of the process on a CPU."""
    if device.type == "cpu":
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _peaks.append(max(_peaks.pop(), torch.cuda.max_memory_allocated()))
    return _peaks[0]


def tensors(b: Built, masks: int) -> dict[str, float]:
    """Memory by kind, counted on the tensors; `masks` are the bytes of the pruner."""
    params, state = list(b.model.parameters()), b.optimizer.state.values()
    return {
        "memory/weights_gib": sum(p.nbytes for p in params) / GIB,
        "memory/grads_gib": sum(p.grad.nbytes for p in params if p.grad is not None) / GIB,
        "memory/optimizer_gib": sum(t.nbytes for s in state for t in s.values()) / GIB,
        "memory/masks_gib": masks / GIB,
    }


# contracts of every trial; members add theirs


def _groups(built: Built) -> tuple[int, int]:
    return built.trainable, sum(p.numel() for g in built.optimizer.param_groups for p in g["params"])


def _product(loop: Any) -> tuple[int, int]:
    return loop.cfg.train.batch_effective * loop.built.length, next(loop.feed())[1].numel() * loop.accum


def _rates(loop: Any) -> tuple[float, Any]:
    """Largest relative error of the applied rate against the formula."""
    peak, scale = loop.cfg.optim.section.lr, loop.cfg.schedule.scale
    pairs = [(peak * scale(step, progress), got) for step, progress, got in [*loop.probes, loop.applied]]
    return 0.0, max(abs(got - wanted) / max(wanted, 1e-30) for wanted, got in pairs)


def _evaluations(loop: Any) -> tuple[int, int]:
    interval = loop.cfg.eval.interval
    whole = loop.step // interval if interval else loop.work.epochs(loop.step)
    return whole + 1 + (not loop.due()), loop.evals


def _written(loop: Any) -> tuple[list[str], list[str]]:
    """Metrics that every trial writes and this one did not."""
    names = {name for row in rundir.rows(loop.attempt.trial) for name in row["m"]}
    return [], [m.name for m in metrics.TABLE.values() if m.required and m.name not in names]


FIRST_LOSS = Clause(
    "loss/first",
    "end",
    lambda loop: (math.log(loop.built.n_vocab), loop.first_loss),
    1.0,  # nats; tied embeddings of GPT-2 size start about 0.2 above ln(vocab), a broken model far from it
)
BUILD = (Clause("optim/groups", "build", _groups),)
END = (
    FIRST_LOSS,
    Clause("batch/product", "end", _product),
    Clause("schedule/rate", "end", _rates, 1e-12),
    Clause("eval/count", "end", _evaluations),
    Clause("metrics/written", "end", _written),
)
