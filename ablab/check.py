# SPDX-License-Identifier: MIT
"""The dry run: every distinct configuration of a plan, shrunk, through everything that a trial does."""

import hashlib
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from ablab import auto, config, dist, forecast, kconf, machine, plugin
from ablab.bind import BindError, origins
from ablab.config import RunConfig
from ablab.data import DataError
from ablab.machine import Gpu
from ablab.model._flow import FlowError
from ablab.plan import flaws
from ablab.plugin import EffectError
from ablab.rig import BLOCK, MICRO, CheckError, Rig, alone_and_together, shrunk
from ablab.rundir import write_bytes

RANKS = 2
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # a checkpoint there syncs at once
WORKERS = 2
OUTCOME = "params fingerprint seconds step_ms cost stage reason refused trace passed memory fits"
SLOWER = 1.2  # times the lowest cost of a step in earlier checks: from there on a case is flagged
UNCOVERED = ("long runs", "speed at full size", "compilation", "GPU kernels")


@dataclass(slots=True)
class Case:
    """A distinct configuration and what came of it."""

    ids: list[str]
    title: str
    values: Mapping[str, Any]
    where: Mapping[str, str]
    config: str = ""
    """The text that was settled."""
    group: str = ""
    again: str = ""
    """The command that tries it again."""
    params: int | None = None
    fingerprint: str = ""
    seconds: float = 0.0
    step_ms: float | None = None
    """CPU time of a step of the small model."""
    cost: float | None = None
    """The same over that of a fixed piece of work beside it."""
    stage: str = ""
    """Where it failed; empty if it did not."""
    reason: str = ""
    refused: bool = False
    """The configuration is at fault, not the code."""
    trace: str = ""
    passed: list[str] = field(default_factory=list)
    memory: dict[str, Any] | None = None
    """Low, likely, high in GiB at full size, bytes by item."""
    fits: str = ""
    """How that compares with the GPU's."""
    notes: list[str] = field(default_factory=list)
    """What is worth a look, and no failure."""

    def fail(self, stage: str, error: Exception) -> None:
        """A text for what is the user's, with its trace for what a member may do in any way."""
        self.stage, self.reason = stage, str(error)
        self.refused = stage in ("bind", "size") and isinstance(error, ValueError) and not isinstance(error, FlowError)
        if self.refused and not isinstance(error, BindError):
            self.reason += origins(self.reason, self.where)
        if not isinstance(error, CheckError | EffectError | ValueError):
            self.reason = f"{type(error).__name__}: {error}"
            frames = traceback.extract_tb(error.__traceback__)
            ours = [f for f in frames if "site-packages" not in f.filename]  # torch's own tell nothing
            self.trace = "".join(traceback.format_list(ours)).rstrip()


def main(folder: str) -> int:
    """Do what folder/plan.json asks for, write folder/verdict.json; 0 if all is well, 1 if not, 2 for a configuration
    that cannot be, 4 if a full-size model cannot fit.

    Mode `measure` lets the device decide what is automatic, `data` prepares data, `forecast` reads it if it is there,
    `check` is the dry run; for the groups that the plan lists under `forecast` each also says what time and memory they
    need.
    """
    torch.set_num_threads(1)
    plan = json.loads((Path(folder) / "plan.json").read_text())
    try:
        gpu = machine.PEAKS[machine.named(plan["gpu"])] if plan.get("gpu") else None
        cases = _cases(plan["trials"])
    except ValueError as error:
        print(error)
        return 2
    if plan["mode"] == "measure":
        return _measure(plan, cases, Path(folder))
    missing, uncovered = [], [*UNCOVERED]
    sets, failures = (
        ({}, []) if plan["mode"] == "forecast" else _data(cases, None if plan.get("start", True) else missing)
    )
    _budgets(cases, sets)
    if plan["mode"] == "data":  # no other stage will look at them
        failures += _unbound(cases)
    if plan["mode"] == "check":
        gpu = gpu or _here(cases)
        spread(cases, gpu)
        if plan.get("random"):
            chosen(cases)
        else:
            twins(cases)
        if plan.get("ddp"):
            together(cases, Path(folder))
        else:
            uncovered.append("several processes (DDP=1)")
        if not gpu:
            uncovered.append("memory at full size (GPU=a10g)")
        uncovered += missing
        _compare(cases, plan.get("costs", {}))
        print(_table(cases))
        for case in cases:
            for note in case.notes:
                print(f"{case.ids[0]}: {note}")
            if case.stage:
                print(f"\n{case.ids[0]}: failed in stage {case.stage}: {case.reason}")
                print(*([case.trace] if case.trace else []), f"again: {case.again}", sep="\n")
        print(f"not covered: {', '.join(uncovered)}")
    print(*failures, sep="\n", end="\n" if failures else "")
    ok = not failures and not any(c.stage for c in cases)
    wanted = [c for c in cases if c.group in plan.get("forecast", ()) and not c.stage]
    asked = gpu if plan["mode"] == "forecast" else None
    made = {c.group: found for c in wanted if (found := _forecast(c, asked, plan.get("band")))}
    ok &= plan["mode"] != "forecast" or len(made) == len(cases)
    verdict = _verdict(plan["mode"], cases, sets, ok) | {"uncovered": uncovered, "failures": failures}
    verdict |= {"forecast": made, "fits": {c.group: c.fits for c in cases if c.fits}}
    write_bytes(Path(folder) / "verdict.json", json.dumps(verdict, indent=1).encode())
    if not ok:
        return 2 if any(c.refused for c in cases) else 1
    return 4 if any(c.fits.startswith("does not fit") for c in cases) else 0


def _measure(plan: Mapping[str, Any], cases: list[Case], folder: Path) -> int:
    """Let the device decide what the arms leave open, by `open` of each group; `limit` bytes stand for its memory."""
    arms = [auto.Arm(c.ids[0], c.values, frozenset(plan["open"][c.group])) for c in cases]
    device = torch.device("cuda" if cases[0].values["SYS_DEVICE_CUDA"] else "cpu")
    try:
        found = auto.choose(arms, auto.Meter(device, plan.get("limit")))
    except ValueError as error:
        print(f"error: {error}")
        return 4 if isinstance(error, auto.NothingFitsError) else 2
    write_bytes(folder / "verdict.json", json.dumps(found, indent=1).encode())
    return 0


def _cases(trials: list[dict[str, Any]]) -> list[Case]:
    """One for all seeds of a configuration, and for all studies that have it."""
    found: dict[str, Case] = {}
    for trial in trials:
        if (key := trial.get("group")) in found:
            found[key].ids.append(trial["id"])
            continue
        settled = kconf.settle(kconf.load(), [kconf.lex(Path(trial["id"]), trial["config"], ".config")])
        key = key or kconf.group(settled.values)
        again = trial.get("again", f"make check STEP={trial['id']}")
        found.setdefault(
            key,
            Case([], trial["title"], settled.values, trial.get("where", settled.where), trial["config"], key, again),
        ).ids.append(trial["id"])
    return list(found.values())


def _forecast(case: Case, gpu: Gpu | None, band: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What a case will need, on this machine or the GPU; None where a member lets none be made.  `band` is what earlier
    trials there teach: it decides whether a case fits, the numbers stay as they are without it."""
    try:
        found, case.fits = forecast.here(config.load(case.values, case.where), gpu, band)
    except Exception as error:  # a member may fail in any way; a trial runs without a forecast all the same
        case.refused = isinstance(error, ValueError)
        kind = "" if case.refused else f"{type(error).__name__}: "
        print(f"{case.ids[0]}: no forecast: {kind}{error}")
        return None
    return {name: value for name, value in asdict(found).items() if name != "flops"}


def _unbound(cases: list[Case]) -> list[str]:
    """What is wrong with the configurations of cases that no stage of theirs will look at."""
    for case in cases:
        try:
            config.load(case.values, case.where)
        except ValueError as error:
            case.fail("bind", error)
    return [f"{c.ids[0]}: failed in stage {c.stage}: {c.reason}" for c in cases if c.stage]


# data


def _data_key(case: Case) -> str:
    chosen = {k: v for k, v in case.values.items() if k.startswith("DATA_") or k == "MODEL_GPT_BLOCK"}
    return json.dumps(chosen, sort_keys=True)


def _data(cases: list[Case], uncovered: list[str] | None) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Manifest by set, each prepared if that needs no network and read once by the real loader; failures.

    A set that a network must bring is a failure, or with a list for it one more entry there.
    """
    sets: dict[str, dict[str, Any]] = {}
    failures = []
    for case in {_data_key(c): c for c in reversed(cases)}.values():
        start = time.perf_counter()
        try:
            cfg = config.load(case.values, case.where)
        except ValueError:  # the stage bind says it
            continue
        try:
            if cfg.data.offline:
                cfg.data.prepare()
            manifest = cfg.data.manifest() | {"path": str(cfg.data.folder / "manifest.json"), "unit": cfg.data.unit}
            sets[_data_key(case)] = manifest
            _read(cfg, manifest)
            unit = cfg.data.unit
            sizes = " ".join(f"{name} {s[unit]}" for name, s in manifest["splits"].items())
            took = time.perf_counter() - start
            print(f"data {manifest['name']} {manifest['sha256'][:12]}: {sizes} {unit}, {took:.2f} s")
        except DataError as error:
            if uncovered is None or cfg.data.offline or (cfg.data.folder / "manifest.json").exists():
                failures.append(f"{case.ids[0]}: failed in stage data: {error}")
            else:
                uncovered.append(f"data of {case.ids[0]} ({error})")
        except (ValueError, CheckError) as error:
            failures.append(f"{case.ids[0]}: failed in stage data: {error}")
    return sets, failures


def _budgets(cases: list[Case], sets: Mapping[str, Any]) -> None:
    """Refuse the cases whose epochs, now that their length is known, have no room for what should happen in them."""
    for case in (c for c in cases if c.values["TRAIN_BUDGET_EPOCHS"] and _data_key(c) in sets):
        try:
            cfg = config.load(case.values, case.where)
        except ValueError:  # the stage bind says it
            continue
        if found := [*flaws(case.values, cfg.data.samples("train", cfg.model.length))]:
            case.stage, case.reason, case.refused = "budget", "; ".join(found), True


def _read(cfg: RunConfig, manifest: Mapping[str, Any]) -> None:
    length = cfg.model.length
    for split in manifest["splits"]:
        cfg.data.inspect(split, next(cfg.data.batches(split, cfg.train.seed, 0, MICRO, length)), MICRO, length)
    cfg.data.evaluation(cfg.eval.tokens or 0, length)


# one case


def run(case: Case) -> None:
    """All stages of a case, up to the first that fails."""
    start = time.perf_counter()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="ablab-", dir=MEMORY) as folder:
        rig = Rig(case.values, case.where, Path(folder))
        for name, stage in rig.stages().items():
            try:
                stage()
            except Exception as error:  # a member may fail in any way; the verdict says how
                case.fail(name, error)
                break
            case.passed.append(name)
    case.params, case.fingerprint, case.step_ms, case.cost = rig.params, rig.fingerprint, rig.step_ms, rig.cost
    case.seconds = time.perf_counter() - start


def memory(case: Case, gpu: Gpu) -> None:
    """What the full-size model needs at its micro batch, beside what the GPU has."""
    try:
        cfg = config.load(case.values, case.where)
        found = forecast.memory(cfg, None)
        case.fits = forecast.verdict(cfg, None, found, gpu)
        case.memory = {"gib": found.mem_gib, "bytes": found.items, "fits": case.fits}
    except Exception as error:  # tensors without memory meet operators that a member alone uses
        case.fail("memory", error)


# all cases


def spread(cases: list[Case], gpu: Gpu | None = None) -> None:
    """Try every case, in one forked process for each core, WORKERS at most; a case knows nothing of the others, so
    the outcome is that of one process.  NOTE fork only while this process has one thread."""

    def work(case: Case) -> None:
        run(case)
        if gpu and not case.stage:
            memory(case, gpu)

    count = min(WORKERS, len(machine.cores()), len(cases))
    if count < 2:
        for case in cases:
            work(case)
        return
    sys.stdout.flush()
    with tempfile.TemporaryDirectory(prefix="ablab-") as folder:
        pids = []
        for rank in range(count):
            if not (pid := os.fork()):
                try:
                    with open(Path(folder) / str(rank), "w") as file:
                        for case in cases[rank::count]:
                            work(case)
                            file.write(json.dumps({name: getattr(case, name) for name in OUTCOME.split()}) + "\n")
                            file.flush()
                finally:
                    os._exit(0)
            pids.append(pid)
        left = []
        for rank, pid in enumerate(pids):
            os.waitpid(pid, 0)
            lines = (Path(folder) / str(rank)).read_text().splitlines()
            gone = []
            for case, line in zip_longest(cases[rank::count], lines):
                for name, value in json.loads(line or "{}").items():
                    setattr(case, name, value)
                gone += [] if line else [case]
            for case in gone[:1]:
                case.stage, case.reason = "process", "it died here; make check with STEP= of this one alone shows more"
            left += gone[1:]
    if left:
        spread(left, gpu)


def twins(cases: list[Case]) -> None:
    """Cases that differ in the model's configuration must differ in what was built."""
    seen: dict[str, tuple[Any, Case]] = {}
    for case in (c for c in cases if c.fingerprint and not c.stage):
        key = {k: v for k, v in shrunk(case.values).items() if k.startswith(BLOCK)}
        known, twin = seen.setdefault(case.fingerprint, (key, case))
        if known != key:
            odd = " ".join(sorted(k for k in known.keys() | key.keys() if known.get(k) != key.get(k))[:4])
            case.stage, case.reason = "fingerprint", f"same model as {twin.ids[0]} though {odd} differ"


def chosen(cases: list[Case]) -> None:
    """Of configurations that chance made: one that is refused in words is no failure, others are shrunk."""
    for case in (c for c in cases if c.stage):
        if case.refused:
            case.notes.append(f"refused: {case.reason}")
            case.stage, case.reason, case.refused = "", "", False
        else:
            case.notes.append(f"fails with no more than {' '.join(least(case))}")


def least(case: Case) -> list[str]:
    """Lines of `.config` without any of which the case no longer fails in its stage, the data apart."""
    tree = kconf.load()
    settled = kconf.settle(tree, [kconf.lex(Path("case"), case.config, ".config")])
    lines = kconf.lex(Path("least"), settled.minimal(), "least").requests
    kept = [r for r in lines if r.name.startswith(("DATA_", "SYS_"))]
    left = [r for r in lines if r not in kept]
    families = [[r for r in left if r.name.partition("_")[0] == f] for f in {r.name.partition("_")[0]: 0 for r in left}]
    for out in [*families, *([r] for r in reversed(left))]:  # what depends on a symbol stands below it
        fewer = [r for r in left if r not in out]
        try:
            values = kconf.settle(tree, [kconf.Layer("least", (*kept, *fewer))])
        except ValueError:  # others depend on it
            continue
        trial = Case([], "", values.values, values.where)
        if len(fewer) < len(left):
            run(trial)
        if trial.stage == case.stage:
            left = fewer
    return [kconf.line_of(r.name, r.text) for r in left] or ["the defaults"]


def together(cases: list[Case], folder: Path) -> None:
    """A step of one case of each set of members in RANKS processes, which must equal that of one process."""
    families = ("MODEL", "ATTN", "MLP", "OPT", "PRUNE")
    chosen: dict[Any, Case] = {}
    for case in (c for c in cases if not c.stage):
        chosen.setdefault(tuple(plugin.selected(f, case.values) for f in families), case)
    todo = [*chosen.values()]
    while todo:
        with tempfile.TemporaryDirectory(dir=folder) as name:
            ranks = [_fork(todo, Path(name), rank) for rank in range(RANKS)]
            codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
            said = [json.loads((Path(name) / f"{rank}.json").read_text()) for rank in range(RANKS) if not codes[rank]]
        done = min((s["done"] for s in said), default=0) if len(said) == RANKS else 0
        for case in todo[:done]:
            case.passed.append("ddp")
        if done < len(todo):
            # the other rank fails too, but later: its peer is gone
            first = min((s for s in said if "error" in s), key=lambda s: s["at"], default=None)
            case, reason = todo[done], f"a process died with exit code {max(codes, key=abs)}"
            case.stage, case.reason = "ddp", first["error"] if first else reason
            case.trace = first["trace"] if first else ""
        todo = todo[done + 1 :]


def _fork(cases: Sequence[Case], folder: Path, rank: int) -> int:
    """Start a rank; NOTE forked while this process has one thread, before which it used no second one."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code, said = 1, {"done": 0}
    try:
        with dist.joined(folder / "store", rank, RANKS) as world:
            for case in cases:
                try:
                    alone_and_together(case.values, case.where, world)
                except Exception as error:
                    mine = Case([], "", {}, {})
                    mine.fail("ddp", error)
                    said |= {"error": mine.reason, "trace": mine.trace, "at": time.monotonic()}
                    break
                said["done"] += 1
            (folder / f"{rank}.json").write_text(json.dumps(said))
            code = 0
            os._exit(code)  # leaving the group would wait for a peer that may be gone
    finally:
        os._exit(code)


def _here(cases: list[Case]) -> Gpu | None:
    """The GPU of this machine, if the cases are for one."""
    wanted = any(c.values["SYS_DEVICE_CUDA"] for c in cases)
    return forecast.present() if wanted and torch.cuda.is_available() else None


def _compare(cases: list[Case], known: Mapping[str, float]) -> None:
    """Note what got slower since earlier checks: their lowest cost is `known`, by group."""
    for case in (c for c in cases if c.cost and c.cost > SLOWER * known.get(c.group, c.cost)):
        times = case.cost / known[case.group]
        case.notes.append(f"a step costs {times:.2f}x what it once did, {case.step_ms:.1f} ms of CPU time now")


# what is reported


def _table(cases: list[Case]) -> str:
    rows = [["id", "title", "parameters", "fingerprint", "time", "step", "verdict"]]
    first: dict[str, float] = {}
    for c in cases:
        study = c.ids[0].rpartition(":")[0]
        base = first.setdefault(study, c.cost) if c.cost else None
        same = [i for i in c.ids if i.rpartition(":")[0] == study]
        more = f" +{len(same) - 1}" if len(same) > 1 else ""
        size, step = f"{c.params:,}" if c.params else "-", f"{c.cost / base:.2f}x" if base else "-"
        words = [f"FAILED {c.stage}" if c.stage else "pass", *([c.fits] if c.fits else [])]
        row = [c.ids[0] + more, c.title, size, c.fingerprint[:12] or "-", f"{c.seconds:.2f} s", step]
        rows.append([*row, ", ".join(words)])
        others = {i.rpartition(":")[0]: i for i in reversed(c.ids) if i not in same}
        rows += [[i, "", size, row[3], "-", "-", f"as {c.ids[0]}"] for i in others.values()]
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = (False, False, True, False, True, True, False)
    lines = []
    for row in rows:
        cells = zip(row, wide, right, strict=True)
        lines.append("  ".join(t.rjust(w) if r else t.ljust(w) for t, w, r in cells).rstrip())
    return "\n".join(lines)


def _verdict(mode: str, cases: list[Case], sets: Mapping[str, Mapping[str, Any]], ok: bool) -> dict[str, Any]:
    """What verdict.json holds; `data` and `check` go into campaign.json."""
    trials = [
        {
            "ids": c.ids,
            "params": c.params,
            "fingerprint": c.fingerprint,
            "passed": c.passed,
            "stage": c.stage or None,
            "reason": c.reason or None,
        }
        for c in cases
    ]
    text = json.dumps(trials, sort_keys=True)  # times are no part of what the hash vouches for
    for case, trial in zip(cases, trials, strict=True):
        trial |= {"title": case.title, "trace": case.trace or None, "again": case.again, "notes": case.notes}
        trial |= {
            "seconds": round(case.seconds, 3),
            "step_ms": case.step_ms,
            "cost": case.cost,
            "group": case.group,
            "memory": case.memory,
        }
    first = next(iter(sets.values()), None)
    data = None
    if first:
        tokens = sum(s[first["unit"]] for s in first["splits"].values())
        data = {"name": first["name"], "sha256": first["sha256"], "tokens": tokens, "manifest": first["path"]}
    word = "skipped" if mode != "check" else "passed" if ok else "failed"
    digest = hashlib.sha256(text.encode()).hexdigest() if mode == "check" else None
    return {"ok": ok, "data": data, "check": {"verdict": word, "sha256": digest}, "trials": trials}
