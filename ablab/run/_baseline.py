# SPDX-License-Identifier: MIT
"""BASELINE=: done trials of an earlier campaign that take the place of those this plan would run again.

They must be what a certificate would let stand beside the new ones: equal configuration, seed by seed, equal code,
software, hardware and data.  A difference is named and nothing starts.
"""

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ablab import kconf, machine, plan, provenance, rundir
from ablab.journal import Journal, TrialState
from ablab.plan import Plan, Trial
from ablab.rundir import Campaign, RunError, TrialDir

SERVICES = ("wandb", "trackio")


@dataclass(frozen=True, slots=True)
class Reuse:
    """What is taken over: folder of our trial -> done trial; and what stands in the way."""

    source: Mapping[str, TrialDir]
    differences: tuple[str, ...]
    missing: tuple[str, ...]
    """Our baseline trials of seeds that the other campaign does not have: they run."""

    def lines(self) -> list[str]:
        """For people."""
        found = [f"{folder} is {t.campaign.name}/{t.record['id']}" for folder, t in self.source.items()]
        return [*found, *(f"{id} runs, its seed is not there" for id in self.missing)]


NOTHING = Reuse({}, (), ())


def find(p: Plan, results: Path, data: Mapping[str, Any] | None = None) -> Reuse:
    """What STUDY_BASELINE names, held against this plan and machine; `data` is the prepared set, once it is known.

    Raises RunError for an address that leads to no campaign of ours.
    """
    name, _, wanted = p.settings.baseline.partition("/")
    if not name:
        return NOTHING
    if name.partition(":")[0] in SERVICES:
        text = "has no manifest of ours, so nothing shows that it is comparable"
        raise RunError(f"BASELINE={p.settings.baseline}: a run of a service {text}; name a campaign: CAMPAIGN[/TRIAL]")
    other = rundir.find(results, name)
    theirs = _arm(other, wanted)
    ours = [t for t in p.trials if (t.step, t.axes) == (p.trials[0].step, p.trials[0].axes)]
    by_seed = {t.record["seed"]: t for t in theirs}
    source, odd = {}, {}
    for t in ours:
        if (match := by_seed.get(t.seed)) is not None:
            odd |= dict.fromkeys(_differences(t, match, data))
            source[t.folder] = match
    missing = tuple(t.id for t in ours if t.seed not in by_seed)
    return Reuse(source, tuple(odd), missing)


def _arm(other: Campaign, wanted: str) -> list[TrialDir]:
    """The trials that `wanted` matches, by default those of the first arm.  Raises RunError."""
    trials = other.trials()
    first = plan.arm_text(trials[0].record["step"], trials[0].record["axes"])
    named = lambda t: any(fnmatchcase(n, wanted) for n in (t.record["id"], t.name, f"step:{t.record['step']}"))
    found = [t for t in trials if (named(t) if wanted else plan.arm_text(t.record["step"], t.record["axes"]) == first)]
    if not found:
        ids = " ".join(t.record["id"] for t in trials[:8])
        raise RunError(f"BASELINE={other.name}/{wanted}: no such trial; trials: {ids}")
    return found


def _differences(ours: Trial, theirs: TrialDir, data: Mapping[str, Any] | None) -> Iterator[str]:
    """Fields in which a done trial is not what this plan would run here and now."""
    if flaw := theirs.flaw():
        yield f"integrity.done: {flaw}"
        return
    m, summary = theirs.manifest() or {}, theirs.summary() or {}
    values = {name: entry["text"] for name, entry in m["config"].items() if kconf.decides(name)}
    lines = kconf.lex(Path("config"), ours.config).requests
    mine = {r.name: r.text for r in lines if kconf.decides(r.name)}
    for name in sorted(values.keys() | mine.keys()):
        if values.get(name) != mine.get(name):
            yield f"treatment.CONFIG_{name}: {values.get(name, 'absent')} there, {mine.get(name, 'absent')} here"
    here, now = machine.inventory(), provenance.software()
    pairs = {
        f"software.{n}": (m["software"].get(n), now[n]) for n in ("python", "torch", "cuda", "hip", "driver", "lock")
    }
    pairs["hardware.cpu"] = m["cpu"]["model"], here.cpu
    if ours.values["SYS_DEVICE_CUDA"]:
        devices = [(d["name"], d["memory_bytes"]) for d in m["devices"]]
        pairs["hardware.model"] = devices, [(d.name, d.memory_bytes) for d in here.devices[: len(devices)]]
    if data:
        pairs |= {f"data.{n}": (m["data"][n], data[n]) for n in ("name", "sha256")}
    yield from (f"{field}: {there} there, {mine} here" for field, (there, mine) in pairs.items() if there != mine)
    modules = m["code"].get("modules") or {"no record": ""}
    changed = [name for name, sha in modules.items() if sha != _source(name)]
    if changed:
        yield f"code.modules: {' '.join(changed[:6])} {'are' if changed[1:] else 'is'} not the same here"
    if broken := [c["name"] for c in summary["contracts"] if not c["ok"]]:
        yield f"effects.contracts: {' '.join(broken)}"


def _source(module: str) -> str:
    """SHA-256 of the source of a module of ablab, empty if there is none."""
    path = provenance.ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def mark(content: dict[str, Any], reuse: Reuse) -> None:
    """Write into the frozen plan where each reused trial comes from."""
    for record in content["trials"]:
        if source := reuse.source.get(rundir.folder_of(record)):
            record["reused"] = {"campaign": source.campaign.name, "sha256": source.campaign.hash, "trial": source.name}


def take(campaign: Campaign, reuse: Reuse) -> None:
    """Copy the files of the reused trials into a new campaign and say in its journal that they are done."""
    journal = Journal.of(campaign)
    for folder, source in reuse.source.items():
        trial, done = campaign.trial(folder), source.read("done")
        lease = journal.claim(trial, reason="reused")
        if lease is None:
            continue
        for part in ("attempts", "checkpoints"):
            shutil.copytree(source.path / part, trial.path / part, dirs_exist_ok=True)
        for name in done["files"]:
            if "/" not in name:
                shutil.copy2(source.path / name, trial.path / name)
        rundir.publish(trial, done["attempt"], lease["lease"], done["files"])
        reason = f"reused from {source.campaign.name}"
        journal.append(folder, TrialState.DONE, reason=reason, evidence=f"trials/{folder}")
