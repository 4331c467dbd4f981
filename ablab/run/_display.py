# SPDX-License-Identifier: MIT
"""What a run shows: bars on a terminal, elsewhere a line for each running trial every 30 s, and failures."""

import json
import os
import time
from pathlib import Path
from typing import Any

from ablab import rundir
from ablab.journal import Replay, TrialState
from ablab.rundir import Campaign, TrialDir

PLAIN_S, BAR_S = 30.0, 1.0
TAIL_BYTES = 1 << 16
SPAN_STEPS = 100  # rates are measured over the newest steps
STOPPED = (TrialState.PREEMPTED, TrialState.INTERRUPTED)
SAMPLE = 20  # newest done trials that a time left is estimated from
TAIL_LINES = 8  # of the log of a failed trial


class Screen:
    """The lines of one runner on stdout."""

    def __init__(self, campaign: Campaign, names: list[str], tty: bool, verbose: bool) -> None:
        self._campaign, self._names, self._verbose = campaign, names, verbose
        self._bars = tty and os.environ.get("TERM", "dumb") != "dumb"
        self._color = self._bars and not os.environ.get("NO_COLOR")
        self._drawn = 0
        self._due = time.monotonic() + (BAR_S if self._bars else PLAIN_S)
        self._said = ""

    def say(self, text: str) -> None:
        """Print lines."""
        self.clear()
        print(text, flush=True)

    def once(self, text: str) -> None:
        """Print a line unless it was the last such line."""
        if text != self._said:
            self._said = text
            self.say(text)

    def detail(self, text: str) -> None:
        """Print lines that only V=1 shows."""
        if self._verbose:
            self.say(text)

    def clear(self) -> None:
        """Take the bars away."""
        if self._drawn:
            print(f"\x1b[{self._drawn}A\x1b[J", end="", flush=True)
            self._drawn = 0

    def tick(self, running: list[TrialDir]) -> None:
        """Show how far the running trials are, when that is due."""
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + (BAR_S if self._bars else PLAIN_S)
        self.clear()
        for trial in running:
            facts = progress(trial)
            bar = f" [{'#' * int(20 * facts['share']):20}]" if self._bars and facts["share"] is not None else ""
            print(f"{self.head(trial)}{bar} {facts['text']}", flush=True)
            self._drawn += self._bars

    def head(self, trial: TrialDir) -> str:
        """`[3/57 r1-s1338]`."""
        return f"[{self._names.index(trial.name) + 1}/{len(self._names)} {trial.record['id']}]"

    def ended(
        self, trial: TrialDir, evidence: Path, state: TrialState, cls: str | None, reason: str, again: bool
    ) -> None:
        """Show the end of an attempt; of a bad one class, last lines, evidence and the next command, unless it
        is tried `again` anyway."""
        if state is TrialState.DONE:
            summary = trial.summary()
            primary, used = summary["primary"], summary["used"]
            text = f"{primary['key']} {primary['value']:.6g}, {used['steps']} steps, {duration(used['total_s'])}"
            return self.say(f"{self.head(trial)} {self.paint('done', 32)}: {text}")
        kind = f"{state} ({cls})" if cls and cls != state else str(state)
        lines = [f"{self.head(trial)} {self.paint(kind, 31)}: {reason}"]
        if state not in STOPPED:
            log = evidence.parent / "log.txt"
            if log.exists():
                lines += [f"    | {line}" for line in tail(log).splitlines()[-TAIL_LINES:]]
            lines.append(f"    evidence: {shown(evidence)}")
        if state not in STOPPED and not again:
            lines.append(f"    next: make rerun CAMPAIGN={self._campaign.name} TARGET={trial.record['id']}")
        self.say("\n".join(lines))

    def paint(self, text: str, color: int) -> str:
        return f"\x1b[{color}m{text}\x1b[0m" if self._color else text


def progress(trial: TrialDir) -> dict[str, Any]:
    """{text, share, eta_s, whole_s} of a running trial, by its newest rows: share of the budget, time left and
    in all, None where they are not known yet."""
    status, lease = trial.status(), trial.lease()
    if not status or not lease or status["lease"] != lease["lease"]:
        return {"text": "starting", "share": None, "eta_s": None, "whole_s": None}
    found = rows(trial.attempt(status["attempt"]).metrics)
    # the status is written every 10 s, rows more often
    now = max([status, *found[-1:]], key=lambda r: r["step"])
    manifest = trial.manifest()
    budget = manifest["budget"] if manifest and manifest["attempt"] == status["attempt"] else {"kind": ""}
    unit = {"steps": "step", "tokens": "tokens", "time": "train_s"}.get(budget["kind"])
    limit = budget["limit"] if unit else None
    words = [f"step {now['step']}" + (f"/{limit:.0f}" if unit == "step" else "")]
    for name, text in (("train_loss", "loss {:.4g}"), ("learning_rate", "lr {:.1e}")):
        values = [r["m"][name] for r in found if r["m"].get(name) is not None]
        words += [text.format(values[-1]).replace("e-0", "e-")] if values else []
    eta, basis, whole = status.get("eta_s"), "", None
    span = [r for r in found if found[-1]["step"] - r["step"] <= SPAN_STEPS]
    if len(span) > 1 and (seconds := span[-1]["train_s"] - span[0]["train_s"]) > 0:
        words.append(f"{count((span[-1]['tokens'] - span[0]['tokens']) / seconds)} tok/s")
        basis = f" (last {span[-1]['step'] - span[0]['step']} steps)"
        if unit and (used := span[-1][unit] - span[0][unit]) > 0:
            wall = span[-1]["wall_s"] - span[0]["wall_s"]
            eta = max(0.0, limit - now[unit]) * wall / used
            whole = span[-1]["wall_s"] + eta
    if eta is not None:
        words.append(f"eta {duration(eta)}{basis}")
    if status["phase"] != "train":
        words.append(status["phase"])
    share = min(1.0, now[unit] / limit) if unit else None
    return {"text": " ".join(words), "share": share, "eta_s": eta, "whole_s": whole}


def estimate(campaign: Campaign, entries: Replay) -> dict[str, Any]:
    """Time left: {left_s, basis}; left_s is None as long as nothing has been measured."""
    states = {name: entries.entry(name).state for name in campaign.records()}
    done = [n for n, s in states.items() if s is TrialState.DONE]
    newest = sorted(done, key=lambda n: entries.entry(n).wall)[-SAMPLE:]
    found = [campaign.trial(n).summary() for n in newest]
    took = [summary["used"]["total_s"] for summary in found if summary]
    now = [progress(campaign.trial(n)) for n, s in states.items() if s is TrialState.RUNNING]
    left = [p["eta_s"] for p in now if p["eta_s"] is not None]
    sample = took or [p["whole_s"] for p in now if p["whole_s"] is not None]
    queued = sum(s is TrialState.QUEUED or s in STOPPED for s in states.values()) + len(now) - len(left)
    if not queued and not left:
        return {"left_s": 0.0, "basis": "nothing is left"}
    if queued and not sample:
        return {"left_s": None, "basis": f"{queued} to run, no rate known yet"}
    jobs = max(len(now), campaign.content["policy"].get("jobs") or 1)
    rest = queued * sum(sample) / len(sample) if queued else 0.0
    kind = f"{len(took)} done" if took else f"{len(sample)} running"
    basis = f"{len(left)} running by their rate, {queued} to run by the mean of {kind}, {jobs} at once"
    return {"left_s": max([(sum(left) + rest) / jobs, *left]), "basis": basis}


def rows(path: Path) -> list[dict[str, Any]]:
    """The newest rows of a metrics file."""
    found = []
    for line in tail(path).splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the first line of the tail may be cut
        if "step" in row:
            found.append(row)
    return found


def tail(path: Path) -> str:
    """The end of a text file."""
    with rundir.plain(path) as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        return file.read().decode(errors="replace")


def shown(path: Path) -> str:
    """A path as short as the working directory allows."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def count(value: float) -> str:
    """41200 -> 41.2k."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """754 -> 13m."""
    for limit, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= 2 * limit:
            return f"{seconds / limit:.0f}{unit}"
    return f"{seconds:.0f}s"
