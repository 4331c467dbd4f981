# SPDX-License-Identifier: MIT
"""A campaign as it runs, for the dashboard and for `make watch`: states, time left, running trials, alerts."""

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from statistics import median
from typing import Any

from ablab import metrics, plan, rundir
from ablab.journal import Journal, Replay, TrialState, Watch
from ablab.report.table import line
from ablab.run import _display
from ablab.rundir import Campaign, TrialDir

# column -> how its numbers look; GiB is the memory in use, forecast what had been expected of it, in GiB too
COLUMNS = {
    "trial": "",
    "state": "",
    "share": "",
    "step": "",
    "loss": ".4f",
    "value": ".4f",
    "vs parent": "+.4f",
    "tok/s": ",.0f",
    "MFU": ".1%",
    "GiB": ".2f",
    "forecast": ".2f",
    "device": "",
    "time left": "",
}
ROWS = 300  # trials in the table; those that run and those that ended badly come first
STALLED = 5  # median intervals without a row
LATE_S = 2.0  # but rows that come faster than they are read are not late before this
RECENT = 10  # telemetry samples that an idle or throttled device is told by
IDLE_PCT = 50.0
GRACE_S = 120.0
BAD = (TrialState.FAILED, TrialState.DIVERGED, TrialState.OOM, TrialState.REFUSED, TrialState.DEAD)


class Live:
    """Reads what changed of one campaign; `now` and `free` are arguments for tests."""

    def __init__(
        self, campaign: Campaign, now: Callable[[], float] = time.time, free: Callable[[], int] | None = None
    ) -> None:
        self.campaign, self._now = campaign, now
        self._free = free or (lambda: shutil.disk_usage(campaign.path).free)
        self._journal, self._watch = Journal.of(campaign), Watch(GRACE_S)
        self._values: dict[str, tuple[Any, dict[int, float]]] = {}
        self._partners: dict[str, str | None] = {}
        self._summaries: dict[str, tuple[int, dict[str, Any] | None]] = {}
        registered = campaign.content["registration"]["metric"]
        self.key = registered["key"]

    def state(self) -> dict[str, Any]:
        """{name counts done total eta basis alerts rows at}: all that a view shows, JSON."""
        entries = self._journal.replay()
        trials = self.campaign.trials()
        states = {t.name: entries.entry(t.name).state for t in trials}
        counts = Counter(str(s) for s in states.values())
        left = _display.estimate(self.campaign, entries)
        text = "time left unknown" if left["left_s"] is None else f"about {_display.duration(left['left_s'])} left"
        rank = {TrialState.RUNNING: 0, **dict.fromkeys(BAD, 1), TrialState.DONE: 3}
        chosen = sorted(trials, key=lambda t: (rank.get(states[t.name], 2), -entries.entry(t.name).wall))[:ROWS]
        return {
            "name": self.campaign.name,
            "counts": {str(s): counts[s] for s in TrialState if counts[s]},
            "done": counts["done"],
            "total": len(trials),
            "eta": text,
            "basis": left["basis"],
            "alerts": list(self._alerts(trials, entries)),
            "rows": [self._row(t, states[t.name], entries.entry(t.name).lease) for t in chosen],
            "at": datetime.fromtimestamp(self._now(), UTC).strftime("%H:%M:%S UTC"),
        }

    def _row(self, t: TrialDir, state: TrialState, lease: int) -> list[Any]:
        """A trial in the order of COLUMNS."""
        row: dict[str, Any] = {"trial": t.record["id"], "state": str(state)}
        said = t.record.get("forecast") or {}
        row["forecast"] = said["mem_gib"][1] if said.get("mem_gib") else None
        values = {} if state is TrialState.QUEUED else self._points(t)
        if values:
            row["value"], parent = values[max(values)], self._parent(t)
            both = values.keys() & parent.keys()
            row["vs parent"] = values[max(both)] - parent[max(both)] if both else None
        if state is TrialState.RUNNING and (status := t.status()):
            found = _display.rows(t.attempt(status["attempt"]).metrics)
            last = {n: v for r in found for n, v in r["m"].items() if v is not None}
            facts = _display.progress(t)
            row |= {"share": facts["share"], "step": max(status["step"], *(r["step"] for r in found[-1:]), 0)}
            row |= {
                "loss": last.get("train_loss"),
                "tok/s": last.get("train/tok_per_sec"),
                "MFU": last.get("train/mfu"),
            }
            row["GiB"] = last.get("memory/allocated_peak_gib", last.get("memory/host_rss_gib"))
            row["device"] = line(" ".join(status["devices"])) or "cpu"
            row["time left"] = None if facts["eta_s"] is None else _display.duration(facts["eta_s"])
            row["state"] = str(state) if status["phase"] == "train" else line(status["phase"])
        elif state is TrialState.DONE and (summary := self._summary(t, lease)):
            row |= {"share": 1.0, "step": summary["used"]["steps"], "tok/s": summary["perf"]["tok_per_s"]}
            row |= {"MFU": summary["perf"]["mfu"], "GiB": summary["perf"]["peak_mem_bytes"] / 2**30}
        return [row.get(name) for name in COLUMNS]

    def _summary(self, t: TrialDir, lease: int) -> dict[str, Any] | None:
        """Content of summary.json, read once for each lease."""
        if self._summaries.get(t.name, (None,))[0] != lease:
            self._summaries[t.name] = lease, t.summary()
        return self._summaries[t.name][1]

    def _points(self, t: TrialDir) -> dict[int, float]:
        """Step -> metric of the campaign, read again when a file has grown."""
        sizes = tuple(a.metrics.stat().st_size for a in t.attempts() if a.metrics.exists())
        if self._values.get(t.name, (None,))[0] != sizes:
            rows = rundir.rows(t, (self.key,))
            self._values[t.name] = sizes, {r["step"]: v for r in rows if (v := r["m"].get(self.key)) is not None}
        return self._values[t.name][1]

    def _parent(self, t: TrialDir) -> Mapping[int, float]:
        """The points of the trial with the same seed in the arm that this one is held against: that of its contrast,
        else the first."""
        records = self.campaign.records()
        if len(self._partners) != len(records):
            known = {(plan.arm_text(r["step"], r["axes"]), r["seed"]): name for name, r in records.items()}
            against, first = dict(reversed(self.campaign.content["contrasts"])), next(iter(known))[0]
            self._partners = {name: known.get((against.get(arm, first), seed)) for (arm, seed), name in known.items()}
        folder = self._partners.get(t.name)
        return self._points(self.campaign.trial(folder)) if folder and folder != t.name else {}

    def _alerts(self, trials: list[TrialDir], entries: Replay) -> Iterator[dict[str, str]]:
        """{kind, trial, text} of all that a person should look at."""
        if (need := self._next_checkpoint(trials)) > (free := self._free()):
            text = f"{free / 2**30:.2f} GiB free, the next checkpoint takes {need / 2**30:.2f} GiB"
            yield {"kind": "disk", "trial": "", "text": text}
        yield from self._mirrors()
        for t in trials:
            entry = entries.entry(t.name)
            if entry.state in BAD:
                kind = "contract breach" if entry.cls == "effect" else str(entry.state)
                yield {"kind": kind, "trial": t.record["id"], "text": line(entry.reason.replace(f"{t.path}/", ""))}
            elif entry.state is TrialState.RUNNING:
                yield from ({"trial": t.record["id"], **found} for found in self._running(t, entry.attempt))

    def _running(self, t: TrialDir, number: int) -> Iterator[dict[str, str]]:
        attempt = t.attempt(number)
        if self._watch.is_dead(t):
            yield {"kind": "heartbeat lost", "text": "its process is gone; make continue takes it up"}
        stamps = [r["t"] for r in _display.rows(attempt.metrics) if "t" in r]
        if len(stamps) > STALLED:
            usual = max(LATE_S, median(b - a for a, b in zip(stamps, stamps[1:], strict=False)))
            if (quiet := self._now() - attempt.metrics.stat().st_mtime) > STALLED * usual:
                yield {"kind": "stalled", "text": f"no row for {quiet:.0f} s; they came every {usual:.3g} s"}
        for made in rundir.lines(attempt.contracts, "contracts"):
            if made.get("ok") is False:
                yield {"kind": "contract breach", "text": line(f"{made['name']} at step {made.get('step')}")}
        recent = [row["devices"] for row in tail(attempt.telemetry) if row.get("devices")][-RECENT:]
        for device in recent[-1] if len(recent) == RECENT else ():
            readings = [r[device] for r in recent if device in r]
            busy = [r["busy_pct"] for r in readings if r.get("busy_pct") is not None]
            if busy and max(busy) < IDLE_PCT:
                yield {"kind": "idle device", "text": line(f"{device}: busy {max(busy):.0f} % at most")}
            if why := {reason for r in readings for reason in r.get("throttle") or ()}:
                yield {"kind": "throttled device", "text": line(f"{device}: {', '.join(sorted(why))}")}

    def _next_checkpoint(self, trials: list[TrialDir]) -> int:
        """Bytes of the largest newest checkpoint; 0 as long as there is none."""
        newest = [saved[0].read("checkpoint") for t in trials[:ROWS] if (saved := t.saved())]
        return max((sum(f["bytes"] for f in made["files"].values()) for made in newest if made), default=0)

    def _mirrors(self) -> Iterator[dict[str, str]]:
        for path in sorted(self.campaign.mirror.glob("*.json")):
            try:
                with rundir.plain(path) as file:
                    found = json.loads(file.read())
            except (OSError, ValueError):
                continue  # it is being replaced, or is no state
            if found.get("state") in ("behind", "conflict"):
                words = f"{path.stem} is {found['state']}, {found.get('left', '?')} rows to send"
                why = f": {found['error']}" if found.get("error") else ""
                yield {"kind": "mirror", "trial": "", "text": line(words + why)}


def tail(path: Any) -> list[dict[str, Any]]:
    """The newest rows of any JSONL file."""
    found = []
    for text in _display.tail(path).splitlines() if path.exists() else ():
        try:
            row = json.loads(text)
        except ValueError:
            continue  # the first line of the tail may be cut
        if isinstance(row, dict):
            found.append(row)
    return found


def unit(campaign: Campaign) -> str:
    """What `value` is: the metric of the campaign with its unit."""
    key = campaign.content["registration"]["metric"]["key"]
    return f"{key} ({metrics.get(key).unit})"
