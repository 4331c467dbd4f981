# SPDX-License-Identifier: MIT
"""The verbs that run: start, continue, rerun, stop, status, estimate.  No torch is loaded here."""

import json
import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ablab import kconf, machine, provenance
from ablab import plan as planning
from ablab.journal import RERUN, Journal, TrialState
from ablab.plan import Plan, Trial
from ablab.run import _baseline, _display, _forecast, local, mirror
from ablab.run._baseline import NOTHING, Reuse
from ablab.run.queue import BAD, LOG_BYTES, Options, Runner, Stop, child_of, counts, result_line, runner_alive
from ablab.rundir import Campaign, RunError, alone, campaigns, checked, write_bytes

__all__ = [
    "NOTHING",
    "Options",
    "amend",
    "check",
    "decided",
    "expected",
    "find_current",
    "finished",
    "forecast",
    "left",
    "listing",
    "measure",
    "rerun",
    "result_line",
    "resume",
    "reused",
    "start",
    "status",
    "stop",
]


def start(plan: Plan, options: Options) -> int:
    """Run a plan, or continue the campaign that already runs it; returns the exit code.

    Raises ValueError when nothing can be started: the results folder cannot be written, nobody said yes.
    """
    results = _results(plan, options)
    if options.name:
        checked(options.name)
    found = None if options.new else find_current(results, plan, options.name)
    trackers = _trackers(plan.base.config(), options)
    if found:
        if not finished(found):
            print(f"continues {found.name}")
        return resume(found, replace(options, trackers=trackers))
    reuse = _baseline.find(plan, results)
    if reuse.differences:
        return _unfit(reuse)
    on = _forecast.device(plan)
    made = _forecast.known(results, on)
    told = _forecast.of(plan, made, results)
    print(_head(plan, _forecast.lines(told, len(plan.trials))), flush=True)
    for line in reuse.lines():
        print(f"reused      {line}", flush=True)
    if "CONFIG_SYS_NATIVE_AUTO=y" in plan.base.config() and not any(map(shutil.which, machine.COMPILERS)):
        print(
            f"native      off: no C++ compiler among {' '.join(machine.COMPILERS)}; results are the same, steps slower"
        )
    _ask(plan, options)
    mirror.ensure(trackers, plan.base.config(), options.mirror)
    with Stop() as stop:
        server = _server(plan.base.config(), [t.overrides for t in plan.trials], options)
        server.start()  # it loads torch while we go on
        mode, wanted = "check" if options.check else "data", {t.group for t in plan.trials} - made.keys()
        band = _forecast.band(results, on)
        code, verdict = _check(server, [_listed(plan, t) for t in plan.trials], mode, options, stop, wanted, band=band)
        made = _forecast.keep(results, verdict.get("forecast", {}), on)
        big = _forecast.oversize(plan, made) if code in (0, 4) else {}
        for trial, why in big.items():
            print(f"{trial}: {why}", flush=True)
        if big or code == 4:  # a cached forecast is none that the check looks at
            code = 0 if options.force and len(big) < len(plan.trials) else 4
            print("FORCE=1 runs the rest" if code else "FORCE=1: these are refused, the rest runs", flush=True)
        if code:
            print(f"nothing was started\nRESULT: exit={code}", flush=True)
            return code
        reuse = _baseline.find(plan, results, verdict["data"])
        if reuse.differences:
            return _unfit(reuse)
        name = options.name or f"{_plain(plan.name)}-{time.strftime('%Y%m%d')}-{plan.hash[:6]}"
        content = planning.frozen(
            plan,
            name=name,
            created=_now(),
            code=provenance.code(),
            data=verdict["data"],
            check=verdict["check"],
            forecast=made,
        )
        if wanted and made:
            for line in _forecast.lines(_forecast.of(plan, made, results), len(plan.trials)):
                print(f"forecast  {line}", flush=True)
        # weights and two moments in fp32: what a checkpoint of the largest trial may take
        size = max([12 * (t["params"] or 0) for t in verdict.get("trials", ())], default=0)
        content["policy"] |= {"jobs": plan.settings.jobs, "checkpoint_bytes": size}
        _baseline.mark(content, reuse)
        _check_disk(results, plan, size)
        configs = {trial.folder: trial.config for trial in plan.trials}
        with alone(results):  # another start of this plan may have been faster
            found = None if options.new else find_current(results, plan, options.name)
            auto = planning.evidence(plan, machine.inventory())
            campaign = found or Campaign.create(results, name, content, configs, options.name is None, auto)
            if not found:
                _baseline.take(campaign, reuse)
        runner = Runner(campaign, options, stop, server)
        if found:
            print(f"continues {found.name}")
            runner.look()
            runner.requeue()
        with mirror.beside(campaign, trackers, stop.signals, options.mirror):
            runner.run()
    return runner.conclude()


def reused(plan: Plan, options: Options) -> Reuse:
    """What BASELINE= brings into a plan, and what stands in the way."""
    return _baseline.find(plan, _folder(plan, options))


def _unfit(reuse: Reuse) -> int:
    print(*(f"not comparable: {line}" for line in reuse.differences), sep="\n")
    print("nothing was started; make them equal, or leave BASELINE= out and run the baseline again\nRESULT: exit=3")
    return 3


def check(
    plans: Sequence[Plan], options: Options, step: str | None = None, named: bool = False, **asked: Any
) -> tuple[int, Path | None]:
    """Dry-run the trials of plans, or of one step of them, all in one process; (0 if all pass, the verdict's file).

    `named`: the plans are those of study files, so a trial is `study:id`.  `asked` goes to the checker: `gpu`, `ddp`.
    The verdict is left in the results folder, its path is the last line.  Raises RunError.
    """
    prefix = {plan.name: f"{plan.name}:" if named else "" for plan in plans}
    found = [(plan, t) for plan in plans for t in plan.trials if step in (None, t.step, t.id)]
    if not found:
        known = [f"{prefix[p.name]}{t.step or t.id}" for p in plans for t in p.trials]
        name = " ".join(plan.name for plan in plans)
        raise RunError(f"STEP={step}: not in {name}; steps: {' '.join(dict.fromkeys(known))}")
    place = _results(plans[0], options) / "check.json"
    before = json.loads(place.read_text()) if place.exists() else {}
    here = machine.inventory()
    asked["costs"] = costs = before.get("costs", {}) if before.get("machine") == [here.host, here.cpu] else {}
    several = len(plans) > 1
    more = {"DDP": "1"} if asked.get("ddp") else {}
    more |= {"GPU": asked["gpu"]} if asked.get("gpu") else {}
    listed = [_listed(p, t, prefix[p.name] if several else "", prefix[p.name], more) for p, t in found]
    if asked.get("random"):
        for trial, (p, _) in zip(listed, found, strict=True):
            words = {"RANDOM": "1", "KCONFIG_SEED": p.name.removeprefix("random-")} | more
            trial["again"] = " ".join(["make check", *(f"{name}={text}" for name, text in words.items())])
    preload = [m for m in options.preload if m != "torch._dynamo"]  # one second, and no shrunk trial needs it
    with Stop() as stop:
        code, verdict = _check(local.Server(preload), listed, "check", options, stop, start=False, **asked)
    if verdict:
        now = {t["group"]: t["cost"] for t in verdict["trials"] if t["cost"] and not asked.get("random")}
        kept = {**costs, **{group: min(cost, costs.get(group, cost)) for group, cost in now.items()}}
        text = json.dumps({**verdict, "machine": [here.host, here.cpu], "costs": kept}, indent=1)
        write_bytes(place, text.encode() + b"\n")
        print(f"verdict: {place.relative_to(Path.cwd()) if place.is_relative_to(Path.cwd()) else place}", flush=True)
    return code, place if verdict else None


def _listed(
    plan: Plan, t: Trial, shown: str = "", study: str = "", asked: Mapping[str, str] = MappingProxyType({})
) -> Any:
    """A trial as the checker reads it; `again` is the command that tries it alone."""
    words = [f"STEP={study}{t.id}", *(f"{name}={text}" for name, text in {**plan.variables, **asked}.items())]
    again = " ".join(["make check", *map(shlex.quote, words)])
    facts = {"id": shown + t.id, "hash": t.hash, "group": t.group, "title": t.title, "config": t.config}
    return facts | {"again": again, "where": {**plan.base.where, **t.origins}}


def forecast(plan: Plan, options: Options, gpu: str | None = None, count: int = 1) -> int:
    """Print time, memory and cost of a plan before it is started, here or on `count` of the GPU called `gpu`; what is
    made for this machine is kept for `make plan`.  Raises ValueError for an unknown GPU."""
    results = _folder(plan, options)
    band = _forecast.band(results, _forecast.device(plan, gpu))
    with Stop() as stop:
        groups, trials = {t.group for t in plan.trials}, [_listed(plan, t) for t in plan.trials]
        server, asked = local.Server(options.preload), {"gpu": gpu, "band": band}
        code, verdict = _check(server, trials, "forecast", options, stop, groups, **asked)
    made = _forecast.fitted(verdict.get("forecast", {}), band)
    if made and not gpu:
        _forecast.keep(results, verdict["forecast"])
    if made:
        whole = _forecast.lines(_forecast.of(plan, made, results, gpu, count), len(plan.trials))
        shown = [f"n can show: {line}" for line in planning.power(plan)] if plan.study else []
        print(_forecast.table(plan, made, verdict.get("fits", {})), *whole, *shown, sep="\n", flush=True)
    return code


def measure(plan: Plan, options: Options) -> int:
    """Let the GPU decide what a plan leaves to it, and remember it for `decided`; the exit code, 4 if nothing fits."""
    arms = {t.group: _listed(plan, t) for t in plan.trials}
    with Stop() as stop:
        server = local.Server(options.preload)
        code, found = _check(server, [*arms.values()], "measure", options, stop, open=plan.open)
    if not code:
        _forecast.decide(_folder(plan, options), plan.measure, found)
    return code


def decided(results: Path) -> Mapping[str, Any]:
    """What a GPU has decided for earlier plans."""
    return _forecast.decided(results)


def expected(plan: Plan, options: Options) -> tuple[dict[str, Any], list[str]]:
    """What is known of the time and memory of a plan without loading torch: as data, and as lines of text."""
    results = _folder(plan, options)
    found = _forecast.of(plan, _forecast.known(results, _forecast.device(plan)), results)
    return found, _forecast.lines(found, len(plan.trials))


def resume(campaign: Campaign, options: Options) -> int:
    """Replay the journal, reap the dead, queue what the policy allows, run it; returns the exit code."""
    if finished(campaign):
        recorded = campaign.status() or {}
        code = recorded["exit"]
        print(f"{campaign.name}: nothing to do; NEW=1 starts another campaign")
        for state in BAD if code == 1 else ():
            if state in recorded["counts"]:
                print(f"from step 0 again: make rerun CAMPAIGN={campaign.name} STATE={state}")
        print(result_line(campaign, code), flush=True)
        return code
    trackers = _trackers(campaign.content["base"]["config"], options)
    mirror.ensure(trackers, campaign.content["base"]["config"], options.mirror)
    with Stop() as stop:
        runner = Runner(campaign, options, stop, _server_of(campaign, options))
        runner.look()
        runner.requeue()
        with mirror.beside(campaign, trackers, stop.signals, options.mirror):
            runner.run()
    return runner.conclude()


def rerun(campaign: Campaign, target: str | None, state: str | None, options: Options) -> int:
    """Run trials again from step 0: those whose id or folder matches the glob `target`, or whose hash starts
    with it, and whose state is `state`; None matches all.  Raises RunError when none is left."""
    if not (target or state):
        raise RunError("rerun: which trials? TARGET=<glob or hash>, STATE=<state>, or both")
    if state and state not in list(TrialState):
        raise RunError(f"STATE={state}: no such state; states: {' '.join(TrialState)}")
    journal, chosen = Journal.of(campaign), []
    entries = journal.replay()
    for folder, record in campaign.records().items():
        named = any(fnmatchcase(n, target or "*") for n in (record["id"], folder))
        hashed = re.fullmatch("[0-9a-f]{6,64}", target or "") and record["hash"].startswith(target)
        if (named or hashed) and state in (None, entries.entry(folder).state):
            chosen.append(folder)
    if not chosen:
        what = f"TARGET={target or '*'} STATE={state or 'any'}"
        ids = " ".join(list(dict.fromkeys(r["id"] for r in campaign.records().values()))[:8])
        raise RunError(f"{campaign.path}: no trial is {what}; trials: {ids}")
    if busy := [n for n in chosen if entries.entry(n).state is TrialState.RUNNING]:
        raise RunError(f"{campaign.path}: {busy[0]} is running; make stop CAMPAIGN={campaign.name} first")
    trackers = _trackers(campaign.content["base"]["config"], options)
    mirror.ensure(trackers, campaign.content["base"]["config"], options.mirror)
    for folder in chosen:
        journal.append(folder, TrialState.QUEUED, reason=RERUN)
    with Stop() as stop:
        runner = Runner(campaign, options, stop, _server_of(campaign, options), frozenset(chosen))
        with mirror.beside(campaign, trackers, stop.signals, options.mirror):
            runner.run()
    return runner.conclude()


def stop(campaign: Campaign) -> str:
    """Ask all runners of a campaign to stop, and children whose runner is gone; returns what was done."""
    journal = Journal.of(campaign)
    write_bytes(campaign.stop_file, f"{time.time():.0f}\n".encode())
    journal.note("stop", "make stop")
    running = [n for n, e in journal.replay().items() if e.state is TrialState.RUNNING]
    for trial in map(campaign.trial, running):
        lease = trial.lease()
        if lease and not runner_alive(lease) and (child := child_of(trial, lease)):
            child.send(local.STOPS[1])
    return f"{campaign.name}: {len(running)} running; they save and stop, make continue resumes"


def status(campaign: Campaign) -> dict[str, Any]:
    """{campaign, path, counts, exit, result, left_s, basis, problems, trials}; a trial has state, attempt,
    class, reason, evidence, and while it runs phase, step, loss and eta_s."""
    entries, trials = Journal.of(campaign).replay(), []
    for folder, record in campaign.records().items():
        entry = entries.entry(folder)
        live = campaign.trial(folder).status() if entry.state is TrialState.RUNNING else None
        row = {"trial": record["id"], "folder": folder, "state": str(entry.state), "attempt": entry.attempt}
        row |= {"class": entry.cls, "reason": entry.reason, "evidence": entry.evidence}
        trials.append(row | {k: live.get(k) if live else None for k in ("phase", "step", "loss", "eta_s")})
    recorded, now = campaign.status() or {}, counts(entries, [*campaign.records()])
    if recorded.get("counts") != now:  # amended or queued since
        recorded = {}
    return {
        "campaign": campaign.name,
        "path": str(campaign.path),
        "counts": now,
        "exit": recorded.get("exit"),
        "result": recorded.get("result"),
        **_display.estimate(campaign, entries),
        "problems": entries.problems,
        "trials": trials,
    }


def left(campaign: Campaign) -> str:
    """The estimate as a line of text."""
    found = _display.estimate(campaign, Journal.of(campaign).replay())
    time_left = "unknown" if found["left_s"] is None else _display.duration(found["left_s"])
    return f"{campaign.name}: {time_left} left ({found['basis']})"


def listing(found: dict[str, Any]) -> str:
    """A `status` as text."""
    width = max(len(t["trial"]) for t in found["trials"])
    lines = [f"{found['campaign']}  {' '.join(f'{k}={v}' for k, v in found['counts'].items())}"]
    for t in found["trials"]:
        now = f"{t['phase']} step {t['step']}" if t["phase"] else ""
        loss = "" if t["loss"] is None else f"loss {t['loss']:.4g}"
        why = "" if t["state"] in ("queued", "running", "done") else f"{t['class'] or ''}: {t['reason']}"
        words = [f"  {t['trial']:{width}}", f"{t['state']:11}", f"attempt {t['attempt']}", now, loss, why]
        lines.append("  ".join(w for w in words if w))
    time_left = "unknown" if found["left_s"] is None else _display.duration(found["left_s"])
    lines += [f"left: {time_left} ({found['basis']})", *found["problems"]]
    return "\n".join([*lines, *([found["result"]] if found["result"] else [])])


def amend(campaign: Campaign, seeds: str) -> str:
    """Add trials with `seeds` further seeds to every arm; `make continue` runs them.  Raises RunError."""
    if not re.fullmatch("[1-9][0-9]{0,3}", seeds):
        raise RunError(f"ADD_SEEDS={seeds}: not a number of seeds; write ADD_SEEDS=2")
    journal = Journal.of(campaign)
    with journal.exclusive():
        content = {**campaign.content, "trials": [*campaign.records().values()]}
        trials = planning.amended(content, int(seeds))
        payload = {"created": _now(), "reason": f"{seeds} further seeds"}
        made = {t["group"]: t["forecast"] for t in content["trials"]}
        payload["trials"] = [planning.record(t, made.get(t.group)) for t in trials]
        campaign.amend(payload, {t.folder: t.config for t in trials})
    journal.note("amend", payload["reason"])
    return f"{campaign.name}: {len(trials)} trials added; make continue CAMPAIGN={campaign.name} runs them"


def find_current(results: Path, plan: Plan, name: str | None = None) -> Campaign | None:
    """The campaign that runs this plan with this code: the newest unfinished one, else the newest; with `name`
    only the one called so."""
    wanted = plan.hash, provenance.tree()
    same = [c for c in campaigns(results) if (c.content["plan"], c.content["code"]["tree"]) == wanted]
    same = [c for c in same if name in (None, c.name)]
    return next((c for c in reversed(same) if not finished(c)), same[-1] if same else None)


def finished(campaign: Campaign) -> bool:
    """True if continuing would start nothing: every trial is done and verifies, or may not be retried."""
    entries = Journal.of(campaign).replay()
    budgets = campaign.content["policy"]["retries"]
    for trial in campaign.trials():
        entry = entries.entry(trial.name)
        if not entry.state.is_finished() or entry.state is TrialState.DEAD or entry.may_retry(budgets):
            return False
        if entry.state is TrialState.DONE and not trial.done():
            return False
    return (campaign.status() or {}).get("exit") is not None


def _trackers(config: str, options: Options) -> tuple[str, ...]:
    return mirror.selected(config, os.environ) if options.trackers is None else options.trackers


def _server(base: str, overrides: Iterable[Iterable[str]], options: Options) -> local.Server:
    """The server for the trials of these configurations."""
    members = local.modules([base, *map("\n".join, overrides)])
    return local.Server((*options.preload, *members))


def _server_of(campaign: Campaign, options: Options) -> local.Server:
    overrides = [t["overrides"] for t in campaign.records().values()]
    return _server(campaign.content["base"]["config"], overrides, options)


def _folder(plan: Plan, options: Options) -> Path:
    return kconf.ROOT / (options.results or plan.settings.results)


def _results(plan: Plan, options: Options) -> Path:
    """The results folder, made and proven writable.  Raises RunError."""
    results = _folder(plan, options)
    try:
        results.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=results).close()
    except OSError as error:
        text = f"{results}: {error.strerror}: campaigns cannot be written there; choose another folder with O="
        raise RunError(text) from error
    return results


def _check_disk(results: Path, plan: Plan, checkpoint_bytes: int) -> None:
    """Raises RunError when what the trials keep does not fit."""
    kept = ("TRAIN_CKPT_KEEP", "TRAIN_CKPT_TOP", "TRAIN_CKPT_BEST", "TRAIN_CKPT_TARGET")
    need = sum(sum(t.values.get(k, 0) for k in kept) * checkpoint_bytes + LOG_BYTES for t in plan.trials)
    free = shutil.disk_usage(results).free
    if free < need:
        text = f"{results}: {need >> 20} MiB needed for {len(plan.trials)} trials, {free >> 20} free"
        raise RunError(f"{text}; make room, lower TRAIN_CKPT_KEEP, or choose another folder with O=")


def _head(plan: Plan, forecast: Iterable[str]) -> str:
    """The listing, the machine, the versions, and what differs from the defaults."""
    here, found = machine.inventory(), provenance.software()
    gpus = ", ".join(d.name for d in here.devices) or "no GPU"
    changed = [line for line in plan.base.minimal().splitlines() if "CONFIG_" in line]
    lines = [planning.listing(plan, forecast).rstrip("\n"), ""]
    lines.append(f"machine     {here.cpu}, {len(here.cores)} cores, {gpus}")
    lines.append(f"versions    python {found['python']}, torch {found['torch']}, kernel {found['kernel']}")
    return "\n".join([*lines, *(f"not default {line}" for line in changed), ""])


def _ask(plan: Plan, options: Options) -> None:
    if not options.yes and not options.tty:
        raise RunError("no terminal to ask on; YES=1 starts without a question")
    if options.yes:
        return
    try:
        answer = input(f"start {len(plan.trials)} trials? [y/N] ")
    except EOFError:
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise RunError("nothing was started")


def _check(
    server: local.Server,
    trials: Sequence[Any],
    mode: str,
    options: Options,
    stop: Stop,
    wanted: Iterable[str] = (),
    **asked: Any,
) -> tuple[int, dict[str, Any]]:
    """Have a child prepare the data, do what `mode` and `asked` say and make the forecasts of these groups, repeat what
    it prints; (exit code, verdict)."""
    with tempfile.TemporaryDirectory(prefix="ablab-") as name:
        folder, sent = Path(name), False
        content = {"trials": trials, "mode": mode, "forecast": sorted(wanted), **asked}
        (folder / "plan.json").write_text(json.dumps(content))
        log = folder / "log.txt"
        log.touch()
        child = server.launch(options.checker, name, log=log)
        with open(log, errors="replace") as text:
            while not child.gone(0.05):
                print(text.read(), end="", flush=True)
                if stop.signals and not sent:
                    child.send(stop.signals[0])
                    sent = True
            print(text.read(), end="", flush=True)
        path = folder / "verdict.json"
        verdict = json.loads(path.read_text()) if path.exists() else {}
    code = 128 + stop.signals[0] if stop.signals else child.code()
    return 1 if code is None or code < 0 else code, verdict


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _plain(name: str) -> str:
    """A name that a folder may have."""
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._") or "run"
