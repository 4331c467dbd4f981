# SPDX-License-Identifier: MIT
"""Checks of the records of one trial, and of the plan: each says what is wrong, or `ok`."""

import hashlib
import math
import tempfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from ablab import rundir
from ablab import study as studies
from ablab.verify._fields import Facts


def contract(f: Facts, name: str) -> str:
    found = [x for x in f.get("summary.contracts") if x["name"] == name]
    if not found:
        return f"{name} was not judged"
    return (
        "ok" if found[0]["ok"] is True else f"{name}: expected {found[0]['expected']}, measured {found[0]['measured']}"
    )


def steps(f: Facts) -> str:
    """Whether rows run from 0 to the last step without a gap."""
    damage: list[str] = []
    steps = sorted({row["step"] for row in rundir.rows(f.t.dir, None, damage)})
    widest, last = int(f.config["TRAIN_LOG_STEPS"]), f.get("summary.used.steps")
    if damage:
        return f"{len(damage)} damaged rows"
    if not steps or steps[0] != 0 or steps[-1] != last:
        return f"rows from {steps[:1]} to {steps[-1:]}, {last} steps done"
    gap = max((b - a for a, b in pairwise(steps)), default=0)
    return "ok" if gap <= widest else f"{gap} steps without a row, TRAIN_LOG_STEPS is {widest}"


def registered(study: Mapping[str, Any], r: Mapping[str, Any]) -> str:
    """What the frozen plan registers otherwise than the text of its study."""
    data = study["text"].encode()
    if hashlib.sha256(data).hexdigest() != study["sha256"]:
        return f"the text of study {study['name']} is not that of its hash"
    with tempfile.NamedTemporaryFile(suffix=".study") as file:
        file.write(data)
        file.flush()
        said = studies.read(Path(file.name))
    names = ("margin", "alpha", "sides", "placebo", "failures", "paired")
    pairs = {n: (getattr(said, n), r[n]) for n in names} | {"looks": (list(said.looks), list(r["looks"]))}
    pairs["metric"] = said.metric, (r["metric"]["key"], r["metric"]["mode"])
    if said.budget:
        pairs["budget"] = said.budget, r["budget"]
    if said.seeds and r["as_written"]:
        pairs["seeds"] = said.seeds, r["seeds"]
    return "; ".join(f"{n} is {b}, the study says {a}" for n, (a, b) in pairs.items() if a != b)


def value(f: Facts, key: str, mode: str) -> str:
    """Whether the value that is judged is that of the rows."""
    said, measured = f.t.value(key, mode), f.t.over(key, mode)
    same = None not in (said, measured) and math.isclose(said, measured)
    return "ok" if same else f"summary says {key} {said}, the rows {measured}"


def reruns(f: Facts, key: str) -> str:
    """Whether an earlier result of the trial was another one, or is gone: else one may run until it is lucky."""
    attempts = f.t.dir.attempts()
    numbers, newest = [a.number for a in attempts], f.t.dir.read("done")["attempt"]
    if numbers != list(range(1, newest + 1)):
        return f"attempts {numbers} of {newest} are there"
    for a in attempts:
        old = a.replaced()
        if old and old["final"].get(key) != f.get("summary.final").get(key):
            return f"attempt {a.number} had ended with {key} {old['final'].get(key)}"
    return "ok"


def drift(f: Facts) -> str:
    """Whether something was allowed to change on the way, or has changed unseen between attempts."""
    resume = f.get("manifest.resume")
    if resume and resume["drift"]:
        return f"ALLOW_DRIFT={','.join(resume['drift'])}"
    now, first = setting(f.files["manifest"]), f.t.dir.lease()["first"]
    for before in (m for a in f.t.dir.attempts() if a.number >= first and (m := a.read("manifest"))):
        if odd := [k for k, v in setting(before).items() if v != now[k]]:
            return f"attempt {before['attempt']} had other {' '.join(odd)}"
    return "ok"


def setting(m: Mapping[str, Any]) -> dict[str, Any]:
    """What must stay as it is over the attempts of a trial; which cores or which of equal devices may change."""
    kept = {k: m.get(k) for k in ("resolved", "batch", "software")}
    devices = [(d["name"], d["memory_bytes"]) for d in m["devices"]]
    return kept | {
        "cpu": (m["cpu"]["model"], len(m["cpu"]["cores"])),
        "devices": devices,
        "code": m["code"].get("modules"),
    }
